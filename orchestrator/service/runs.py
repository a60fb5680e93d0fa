"""The life of a run as the service knows it: its states, the moves between them, and what clients read of it.

    queued ──► starting ──► running ──► succeeded | failed | cancelled
       │          │          ▲  │
       │          │          │  ▼
       │          └──► recovering, waiting_teacher       a process was lost, or its teacher is away; not an end
       └──────────┴────────────┴──► cancelling ──► any of the three

Pure. Refuses to leave a final state, and to go back before a run was started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from potstill.errors import ConfigError, PotstillError, ServiceError, TeacherError
from potstill.journal import Status


class State(StrEnum):
    """A journal's Status, and `cancelling`: asked to stop, not yet stopped. Only the service knows that one."""

    QUEUED = Status.QUEUED.value
    STARTING = Status.STARTING.value
    RUNNING = Status.RUNNING.value
    WAITING_TEACHER = Status.WAITING_TEACHER.value
    RECOVERING = Status.RECOVERING.value
    CANCELLING = "cancelling"
    SUCCEEDED = Status.SUCCEEDED.value
    FAILED = Status.FAILED.value
    CANCELLED = Status.CANCELLED.value

    @property
    def final(self) -> bool:
        return not MOVES[self]


_ENDS = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

# A state may be skipped, because a report can reach the service late: it was away while the run went on.
MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset(State) - {State.QUEUED},
    State.STARTING: _ENDS | {State.RUNNING, State.WAITING_TEACHER, State.RECOVERING, State.CANCELLING},
    State.RUNNING: _ENDS | {State.WAITING_TEACHER, State.RECOVERING, State.CANCELLING},
    State.WAITING_TEACHER: _ENDS | {State.RUNNING, State.RECOVERING, State.CANCELLING},
    State.RECOVERING: _ENDS | {State.STARTING, State.RUNNING, State.WAITING_TEACHER, State.CANCELLING},
    State.CANCELLING: _ENDS,
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


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
    state: State
    config: Mapping[str, Any]
    submission_id: str  # its job's name in the cluster, fixed before the job is launched
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: Failure | None


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
    """The run as the API shows it. The hash of its token and the row's number stay inside."""
    return {
        "id": run.id,
        "object": "run",
        "status": run.state.value,
        "created_at": _rfc3339(run.created_at),
        "started_at": _rfc3339(run.started_at),
        "finished_at": _rfc3339(run.finished_at),
        "submission_id": run.submission_id,
        "error": asdict(run.error) if run.error is not None else None,
        "config": dict(run.config),
    }


def event_resource(event: Event) -> dict[str, Any]:
    """The event as the API shows it."""
    return {
        "object": "run.event",
        "seq": event.seq,
        "time": _rfc3339(event.time),
        "type": event.type,
        "level": event.level,
        "message": event.message,
        "data": dict(event.data),
    }


def _rfc3339(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
