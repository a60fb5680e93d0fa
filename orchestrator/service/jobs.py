"""A run as a Ray job: launched, looked at and stopped through Ray's job submission API.

The service never runs a run in its own process: it can restart while runs go on. A job's name in the cluster
(`submission_id`) is fixed before it is launched, so that launching twice cannot start two.
Refuses to guess: what Ray does not answer is a ServiceError, not a state.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orchestrator.service.runs import Run
from potstill.calling.guard import LOOPBACK
from potstill.errors import ServiceError
from potstill.process_log import log_of
from potstill.teachers.opening import ALLOWED

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_WAIT_S = 60  # between SIGTERM and SIGKILL: a run that is asked to stop writes its checkpoint and report first


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the cluster knows of one run's process."""

    alive: bool
    exit_code: int | None  # None while alive, and when it was stopped or never started
    ours: bool  # launched by this service, or by another one over the same database


class Launcher(Protocol):
    """Starts and stops the processes of runs. Raises ServiceError (503) when the cluster does not answer."""

    def launch(self, run: Run, config: Path, token: str, *, resume: bool) -> None:
        """Start `run` from its config file, or go on with it. The token travels in the environment alone.

        What the process writes goes to the end of its log in the config's folder (potstill/process_log.py).
        """

    def look(self) -> Mapping[str, Job]:
        """Every job that the cluster remembers, by submission id."""

    def stop(self, submission_id: str) -> None:
        """Ask a job to stop, with SIGTERM first. Asking again is harmless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where Ray's job API is. `token` is its bearer token; None: as RAY_AUTH_MODE and RAY_AUTH_TOKEN say."""

    address: str
    token: str | None


def teachers_allowed() -> str:
    """Where submitted runs, and the service for its clients, may call teachers beside public addresses.

    What a client says is somebody else's text: it may not look around in the operator's network.
    """
    return os.environ.get(ALLOWED, ",".join(LOOPBACK))


class RayLauncher:
    """Runs as Ray jobs. `command` is what starts a run; the config's path and --report-to are appended to it.

    `service` tells the jobs of this service from those of another one on the same cluster.
    """

    def __init__(self, cluster: Cluster, *, command: Sequence[str], report_url: str, service: str) -> None:
        self._cluster = cluster
        self._command = tuple(command)
        self._report_url = report_url
        self._service = service

    def launch(self, run: Run, config: Path, token: str, *, resume: bool) -> None:
        arguments = [str(config), "--report-to", self._report_url, *(["--resume"] if resume else [])]
        environment = {
            "POTSTILL_RUN_TOKEN": token,
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            ALLOWED: teachers_allowed(),
            "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # what the run gives its own actors is laid over this, not refused
        }
        log = shlex.quote(str(log_of(config.parent)))  # Ray's own copy is gone with the cluster
        with _ray_errors():
            self._client.submit_job(
                entrypoint=f"exec {shlex.join([*self._command, *arguments])} >> {log} 2>&1",
                submission_id=run.submission_id,
                runtime_env={"env_vars": environment},
                metadata={"potstill_run": run.id, "potstill_service": self._service},
            )

    def look(self) -> Mapping[str, Job]:
        with _ray_errors():
            jobs = self._client.list_jobs()
        return {
            job.submission_id: Job(
                alive=not job.status.is_terminal(),
                exit_code=job.driver_exit_code,
                ours=(job.metadata or {}).get("potstill_service") == self._service,
            )
            for job in jobs
            if job.submission_id is not None
        }

    def stop(self, submission_id: str) -> None:
        with _ray_errors():
            self._client.stop_job(submission_id)

    @cached_property
    def _client(self) -> JobSubmissionClient:
        from ray.job_submission import JobSubmissionClient

        headers = {"Authorization": f"Bearer {self._cluster.token}"} if self._cluster.token is not None else None
        return JobSubmissionClient(self._cluster.address, headers=headers)


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Ray's client raises RuntimeError for every refusal, and lets its transports' errors through."""
    import requests
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError:
        raise ServiceError("the Ray cluster refuses our token: check RAY_AUTH_TOKEN", 503, "cluster_refused") from None
    except (RayError, RuntimeError, ConnectionError, requests.RequestException) as error:
        raise ServiceError("the Ray cluster does not answer", 503, "cluster_unavailable") from error
