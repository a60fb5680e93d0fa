"""What the runs of one key have used, and hold: counted anew whenever somebody asks, so that it cannot drift."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from orchestrator.service.runs import State
from orchestrator.service.scheduling import Usage
from orchestrator.service.store.schema import RUNS


def _sum(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.coalesce(sa.func.sum(column), 0)


def _count(states: Iterable[State]) -> sa.ColumnElement[Any]:
    return _sum(sa.case((RUNS.c.status.in_([state.value for state in states]), 1), else_=0))


_PRESENT = sa.case((RUNS.c.launched_at.is_(None), 0.0), else_=sa.bindparam("now", type_=sa.Double) - RUNS.c.launched_at)
_USAGE = sa.select(
    sa.func.count().label("runs"),
    _count(state for state in State if not state.final).label("unfinished"),
    _count(state for state in State if state.active).label("running"),
    (_sum(RUNS.c.gpus * (RUNS.c.busy_s + _PRESENT)) / 3600.0).label("gpu_hours"),
    _sum(RUNS.c.teacher_tokens).label("teacher_tokens"),
    _sum(RUNS.c.teacher_usd).label("teacher_usd"),
).where(RUNS.c.key_id == sa.bindparam("key"))


def usage_of(db: sa.Connection, key_id: str) -> Usage:
    """Within the transaction of `db`."""
    row = db.execute(_USAGE, {"key": key_id, "now": time.time()}).one()
    return Usage(
        runs=int(row.runs),
        unfinished=int(row.unfinished),
        running=int(row.running),
        gpu_hours=float(row.gpu_hours),
        teacher_tokens=int(row.teacher_tokens),
        teacher_usd=float(row.teacher_usd),
    )
