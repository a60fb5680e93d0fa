"""A run's row moved along runs.MOVES: its state, its clock, and the event that says so, in one transaction.

Whoever calls holds the row's lock.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from orchestrator.reporting import ReportedStatus
from orchestrator.service.runs import Failure, State, check_move
from orchestrator.service.store.events import note_state
from orchestrator.service.store.run_rows import state_row
from orchestrator.service.store.schema import RUNS
from potstill.errors import ServiceError


def move_row(
    db: sa.Connection,
    row: Any,
    state: State,
    message: str,
    failure: Failure | None,
    when: float,
    *,
    retry: bool = False,
) -> None:
    """Raises ServiceError (409, illegal_transition), unless it is a `retry`. `when`: seconds since the epoch."""
    if not retry:
        check_move(row.id, State(row.status), state)
    error = asdict(failure) if failure is not None else None
    change: dict[str, Any] = {
        "status": state.value,
        "status_since": when,
        "status_message": message,
        "error": error,
    }
    if state is State.STARTING:
        change["launched_at"] = when
    if state is State.RUNNING and row.started_at is None:
        change["started_at"] = when
    if row.launched_at is not None and (not state.active or state is State.RECOVERING):
        change |= {"launched_at": None, "busy_s": row.busy_s + max(0.0, when - row.launched_at)}
    change["finished_at"] = when if state.final else None
    db.execute(RUNS.update().where(RUNS.c.id == row.id).values(change))
    note_state(db, row.id, state, message, error)


def apply_status(db: sa.Connection, row: Any, reported: ReportedStatus) -> Any:
    """Move a run as it reports. One that was asked to pause and stopped is paused, not cancelled."""
    current, wanted, error = State(row.status), State(reported.status.value), reported.error
    if current is State.PAUSING and wanted is State.CANCELLED:
        wanted = State.PAUSED
    try:
        check_move(row.id, current, wanted)
    except ServiceError:
        return row
    failure = Failure(type=error.type, category=error.category, message=error.message) if error is not None else None
    move_row(db, row, wanted, f"the run reports that it is {wanted}", failure, reported.time)
    return state_row(db, row.id)
