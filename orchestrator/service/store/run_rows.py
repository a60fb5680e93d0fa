"""A row of the table of runs: found, locked, and read as the run that it describes."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from orchestrator.service.principals import Principal
from orchestrator.service.runs import Failure, ResolvedRun, State
from orchestrator.service.store.pages import visible
from orchestrator.service.store.schema import RUNS
from potstill.errors import ServiceError

# Statements of every report and every follower are built once.
OF = RUNS.c.id == sa.bindparam("of")
_STATE = sa.select(RUNS.c.id, RUNS.c.status, RUNS.c.started_at, RUNS.c.launched_at, RUNS.c.busy_s).where(OF)
_STATE_LOCKED = _STATE.with_for_update()
UNRESOLVED = [column for column in RUNS.c if column is not RUNS.c.config]  # what the lists have of a run


def run_of(row: Any) -> ResolvedRun:
    """A row of the table as the run it describes."""
    return ResolvedRun(**fields_in(row))


def fields_in(row: Any) -> dict[str, Any]:
    """The fields of Run, and of ResolvedRun where the row has a config."""
    read = dict(row._mapping)
    del read["number"]
    return {
        "state": State(read.pop("status")),
        "state_since": read.pop("status_since"),
        "state_message": read.pop("status_message"),
        "error": Failure(**error) if (error := read.pop("error")) is not None else None,
        **read,
    }


def row_of(db: sa.Connection, run_id: str, viewer: Principal | None = None, *, lock: bool = False) -> Any:
    query = sa.select(RUNS).where(RUNS.c.id == run_id, visible(RUNS, viewer))
    row = db.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise no_such_run()
    return row


def state_row(db: sa.Connection, run_id: str, *, lock: bool = False) -> Any:
    """What a change of state asks of a run, without what its client wrote."""
    row = db.execute(_STATE_LOCKED if lock else _STATE, {"of": run_id}).first()
    if row is None:
        raise no_such_run()
    return row


def no_such_run() -> ServiceError:
    return ServiceError("there is no such run", 404, "run_not_found")
