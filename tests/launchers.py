"""Launchers that the service's tests hand in for Ray: plain subprocesses, nothing at all, and a cluster that is away.

`python -m tests.launchers FOLDER PORT SCRIPT [DATABASE [HOLDER]]` serves the real app over FOLDER/potstill.db, or over
DATABASE, so that a test can kill -9 it. HOLDER is its name in the supervisor's lease.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import uvicorn

from orchestrator.service import logs
from orchestrator.service.app import create_app
from orchestrator.service.jobs import Job
from orchestrator.service.keys import Signer
from orchestrator.service.runs import Run
from orchestrator.service.serve import compose
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from potstill.errors import ServiceError
from potstill.process_log import log_of

POLL_S = 0.05
LEASE_S = 2.0


class ProcessLauncher:
    """One process per run, in a session of its own; what is known of it lies in files, so a restart forgets nothing."""

    def __init__(self, folder: Path, script: str, report_url: str) -> None:
        self._folder = folder
        self._script = script
        self._report_url = report_url
        folder.mkdir(parents=True, exist_ok=True)

    def launch(self, run: Run, config: Path, token: str, *, resume: bool) -> None:
        place = self._folder / run.submission_id
        if place.exists():  # as Ray refuses a second job of one name
            raise ServiceError("there is such a job already", 503, "cluster_unavailable")
        # The job makes its own place, so that a service that is killed here leaves a whole job or none.
        job = f'{self._script} & echo $! > "{place}/pid"; wait $!; echo $? > "{place}/exit"'
        shell = f'mkdir "{place}" && {{ {job}; }}'
        environment = {
            **os.environ,
            "POTSTILL_RUN_TOKEN": token,
            "PYTHON": sys.executable,
            "CONFIG": str(config),
            "REPORT_TO": self._report_url,
            "RESUME": "--resume" if resume else "",
        }
        with log_of(config.parent).open("ab") as log:
            started = subprocess.Popen(
                ["sh", "-c", shell], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        while not place.exists() and started.poll() is None:
            time.sleep(0.001)

    def look(self) -> Mapping[str, Job]:
        return {place.name: self._job(place) for place in self._folder.iterdir()}

    def stop(self, submission_id: str) -> None:
        place = self._folder / submission_id
        if (place / "pid").exists() and not (place / "exit").exists():
            with contextlib.suppress(ValueError, ProcessLookupError):  # it is just beginning, or has just ended
                os.kill(int((place / "pid").read_text()), signal.SIGTERM)

    def _job(self, place: Path) -> Job:
        code = (place / "exit").read_text().strip() if (place / "exit").exists() else ""
        return Job(alive=not code, exit_code=int(code) if code else None, ours=True)


class EndlessLauncher:
    """A cluster in which nothing runs and nothing ends: every job that it is given lives until it is stopped.

    `known` are the submission ids of jobs that it had before.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._alive = dict.fromkeys(known, True)

    def launch(self, run: Run, config: Path, token: str, *, resume: bool) -> None:
        self._alive[run.submission_id] = True

    def look(self) -> Mapping[str, Job]:
        return {job: Job(alive=alive, exit_code=None, ours=True) for job, alive in list(self._alive.items())}

    def stop(self, submission_id: str) -> None:
        self._alive[submission_id] = False

    def log_tail(self, submission_id: str) -> str:
        return ""


class AwayLauncher:
    """A cluster that does not answer."""

    def launch(self, run: Run, config: Path, token: str, *, resume: bool) -> None:
        raise ServiceError("the cluster does not answer", 503, "cluster_unavailable")

    def look(self) -> Mapping[str, Job]:
        raise ServiceError("the cluster does not answer", 503, "cluster_unavailable")

    def stop(self, submission_id: str) -> None:
        raise ServiceError("the cluster does not answer", 503, "cluster_unavailable")


def main() -> None:
    from tests.services import options

    logs.start()
    folder, port, script, *rest = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    asked = options(folder, rest[0] if rest else None)
    store = Store(Database(asked.database))
    launcher = ProcessLauncher(folder / "jobs", script, f"http://127.0.0.1:{port}")
    holder = rest[1] if len(rest) > 1 else "test"
    state = compose(store, launcher, Signer(b"test"), asked, holder=holder, poll_s=POLL_S, lease_s=LEASE_S)
    uvicorn.run(create_app(state), host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()
