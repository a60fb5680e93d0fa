"""The life of a run as the service knows it: its states, the moves between them, and what clients read of it.

    queued ──► starting ──► running ──► succeeded | failed | cancelled ──► queued    retry: another attempt
       │          │          ▲  │
       │          │          │  ▼
       │          └──► recovering, waiting_teacher       a process was lost, or its teacher is away; not an end
       │                     │
       ├─────────────────────┼──► pausing ──► paused ──► queued    resume: another attempt, from the last checkpoint
       └─────────────────────┴──► cancelling ──► any of the three ends

Pure. Refuses to leave a final state but by a retry, and to go back before a run was started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from potstill.errors import ConfigError, PotstillError, ServiceError, TeacherError
from potstill.journal import Status


class State(StrEnum):
    """A journal's Status, and what was asked of a run and is not yet so: only the service knows that."""

    QUEUED = Status.QUEUED.value
    STARTING = Status.STARTING.value
    RUNNING = Status.RUNNING.value
    WAITING_TEACHER = Status.WAITING_TEACHER.value
    RECOVERING = Status.RECOVERING.value
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = Status.SUCCEEDED.value
    FAILED = Status.FAILED.value
    CANCELLED = Status.CANCELLED.value

    @property
    def final(self) -> bool:
        return not MOVES[self]

    @property
    def active(self) -> bool:
        """Whether it has processes, or may have."""
        return not self.final and self not in {State.QUEUED, State.PAUSED}


_ENDS = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
_ASKED = frozenset({State.PAUSING, State.CANCELLING})

# A state may be skipped, because a report can reach the service late: it was away while the run went on.
MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset(State) - {State.QUEUED},
    State.STARTING: _ENDS | _ASKED | {State.RUNNING, State.WAITING_TEACHER, State.RECOVERING},
    State.RUNNING: _ENDS | _ASKED | {State.WAITING_TEACHER, State.RECOVERING},
    State.WAITING_TEACHER: _ENDS | _ASKED | {State.RUNNING, State.RECOVERING},
    State.RECOVERING: _ENDS | _ASKED | {State.STARTING, State.RUNNING, State.WAITING_TEACHER, State.PAUSED},
    State.PAUSING: _ENDS | {State.PAUSED, State.CANCELLING},
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLING, State.CANCELLED}),
    State.CANCELLING: _ENDS,
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
RETRIED = frozenset({State.FAILED, State.CANCELLED})
_LINKED = ("config", "events", "metrics", "logs", "samples", "checkpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run failed. `category` says whose problem it is: user, system, teacher or capacity."""

    type: str
    category: str
    message: str
    log_tail: str | None = None  # last lines of its process, where it died without a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row of the service's table. Times are unix seconds."""

    id: str  # the config's `name`
    owner: str
    key_id: str
    state: State
    state_since: float
    state_message: str  # why it is in that state
    submitted: Mapping[str, Any]  # its config as its client wrote it: models, files and teachers by name
    config_sha256: str | None
    submission_id: str  # its job's name in the cluster, fixed before the job is launched
    attempt: int  # from 1; a lost process, a resume and a retry begin another
    revision: int  # of priority, metadata and notes
    priority: int
    metadata: Mapping[str, str]
    notes: str
    step: int  # the last one that it has reported
    latest: Mapping[str, float | None]  # that step's numbers
    heartbeat_at: float | None  # when it was heard of last
    code_version: str | None  # of potstill, in the process that reported last
    error: Failure | None
    forked_from: str | None
    forked_checkpoint: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    launched_at: float | None  # its present process
    gpus: float  # that it holds while it has processes
    busy_s: float  # for how long it had them, before the present one
    teacher_tokens: int
    teacher_usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun(Run):
    """With all that decides it, ten times as long: lists do without."""

    config: Mapping[str, Any]  # resolved, as its process reads it


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a run, numbered by the service from 1 without gaps."""

    seq: int
    time: float
    type: str
    level: str
    message: str
    data: Mapping[str, Any]


class SequenceGap(ServiceError):
    """A report skips records. args: message, HTTP status, code, stream, the sequence number that is wanted."""

    def __init__(self, message: str, status: int, code: str, stream: str, wanted: int) -> None:
        super().__init__(message, status, code, stream, wanted)

    @property
    def stream(self) -> str:
        return str(self.args[3])

    @property
    def wanted(self) -> int:
        return int(self.args[4])


def check_move(run_id: str, current: State, wanted: State) -> None:
    """Raises ServiceError (409, illegal_transition) unless a run may go from `current` to `wanted`."""
    if wanted not in MOVES[current]:
        why = "which is final" if current.final else f"from which it cannot become {wanted}"
        raise ServiceError(f"run {run_id} is {current}, {why}", 409, "illegal_transition")


def category_of_exit(exit_code: int | None) -> str:
    """Whose problem a process's exit code names, by the error tree; an unknown one is the system's."""
    by_code = {error.exit_code: error.category for error in (ConfigError, TeacherError)}
    return by_code.get(exit_code, PotstillError.category) if exit_code is not None else PotstillError.category


def run_resource(run: Run) -> dict[str, Any]:
    """The run as the API shows it. Its config has a path of its own; the row's number stays inside."""
    submitted = run.submitted  # says what is asked here, and is read sooner than the whole config
    return {
        "id": run.id,
        "object": "run",
        "status": run.state.value,
        "status_since": rfc3339(run.state_since),
        "status_message": run.state_message,
        "attempt": run.attempt,
        "created_at": rfc3339(run.created_at),
        "started_at": rfc3339(run.started_at),
        "finished_at": rfc3339(run.finished_at),
        "heartbeat_at": rfc3339(run.heartbeat_at),
        "created_by": run.key_id,
        "owner": run.owner,
        "priority": run.priority,
        "metadata": dict(run.metadata),
        "notes": run.notes,
        "method": submitted["method"],
        "student": submitted["student"]["model"],
        "teacher": submitted["teacher"].get("name") or submitted["teacher"]["kind"],
        "progress": progress(run),
        "latest_metrics": dict(run.latest),
        "usage": {
            "gpu_hours": run.gpus * run.busy_s / 3600.0,
            "teacher_tokens": run.teacher_tokens,
            "teacher_usd": run.teacher_usd,
        },
        "forked_from": None
        if run.forked_from is None
        else {"run": run.forked_from, "checkpoint": run.forked_checkpoint},
        "submission_id": run.submission_id,
        "config_sha256": run.config_sha256,
        "code_version": run.code_version,
        "error": asdict(run.error) if run.error is not None else None,
        "links": {"html": f"/runs/{run.id}"} | {name: f"/v1/runs/{run.id}/{name}" for name in _LINKED},
    }


def config_sha256(config: Mapping[str, Any]) -> str:
    """Of all that decides a run's numbers: runs of one digest differ in their names alone, and where they lie."""
    deciding = {key: value for key, value in config.items() if key not in {"name", "runs"}}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def config_resource(run: ResolvedRun) -> dict[str, Any]:
    """The resolved config, with the names that its client used: where things lie on the service's disk stays inside."""
    return {**_with_names(run.config, run.submitted), "teacher": dict(run.submitted["teacher"])}


def _with_names(resolved: Mapping[str, Any], submitted: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in resolved.items() if key != "runs"}
    for key, value in submitted.items():
        inner = merged.get(key)
        tables = isinstance(inner, Mapping) and isinstance(value, Mapping)
        merged[key] = _with_names(inner, value) if tables else value  # type: ignore[arg-type]
    return merged


def progress(run: Run) -> dict[str, Any]:
    """How far it is. `eta_seconds` is None where nothing can be said yet, or any more."""
    steps = int(run.submitted["loop"]["steps"])
    eta = None
    if (
        run.launched_at is not None
        and run.started_at is not None
        and run.heartbeat_at is not None
        and 0 < run.step < steps
    ):
        eta = (run.heartbeat_at - run.started_at) / run.step * (steps - run.step)
    share = run.step / steps if steps else 1.0
    return {
        "step": run.step,
        "max_steps": steps,
        "percent": round(100.0 * share, 1),
        "eta_seconds": None if eta is None else round(eta, 1),
        "tokens_trained": run.latest.get("tokens_trained"),
    }


def event_resource(event: Event) -> dict[str, Any]:
    """The event as the API shows it."""
    return {
        "object": "run.event",
        "seq": event.seq,
        "time": rfc3339(event.time),
        "type": event.type,
        "level": event.level,
        "message": event.message,
        "data": dict(event.data),
    }


def rfc3339(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
