"""Events of runs: append-only, numbered by the service from 1 without gaps, whoever reports and however often.

The functions that take a connection are called within a transaction that holds the run's row (runs.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from orchestrator.reporting import Report
from orchestrator.service.runs import Event, SequenceGap, State
from orchestrator.service.store.database import Database, append
from orchestrator.service.store.schema import EVENTS

STREAMS = ("events", "metrics")  # a run's own logs
FEW = 200  # events: read in some milliseconds


def _newest(column: sa.ColumnElement[Any], *where: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    """The largest number of a run's events, 0 before the first."""
    query = sa.select(sa.func.coalesce(sa.func.max(column), 0)).where(EVENTS.c.run_id == sa.bindparam("of"), *where)
    return query.scalar_subquery()


# Statements that are asked all the time are built once.
# One question in the middle of every report: the last event's number, and the last one held of each log.
_NEWEST = sa.select(
    _newest(EVENTS.c.seq).label("seq"),
    *(_newest(EVENTS.c.report_seq, EVENTS.c.stream == stream).label(stream) for stream in STREAMS),
)


_BEHIND = (
    sa.select(EVENTS)
    .where(EVENTS.c.run_id == sa.bindparam("of"), EVENTS.c.seq > sa.bindparam("after"))
    .order_by(EVENTS.c.seq)
    .limit(sa.bindparam("most"))
)
_LAST = sa.select(_newest(EVENTS.c.seq))


class Events:
    def __init__(self, database: Database) -> None:
        self._database = database

    def list(
        self, run_id: str, *, after: int, limit: int, level: str | None = None, type: str | None = None
    ) -> list[Event]:
        """Events with seq > after, in order. Whether the run exists, and for whom, is the caller's question."""
        query = _BEHIND
        if level is not None:
            query = query.where(EVENTS.c.level == level)
        if type is not None:
            query = query.where(EVENTS.c.type == type)
        with self._database.reading(much=is_much(limit, level, type)) as db:
            return [_event(row) for row in db.execute(query, {"of": run_id, "after": after, "most": limit})]

    def told(self, run_id: str, *, before: int | None = None, limit: int) -> Sequence[Event]:
        """What people read of a run, newest first: all but the steps' numbers; with `before`, what came earlier."""
        query = sa.select(EVENTS).where(EVENTS.c.run_id == run_id, EVENTS.c.stream != "metrics")
        if before is not None:
            query = query.where(EVENTS.c.seq < before)
        with self._database.reading() as db:
            return [_event(row) for row in db.execute(query.order_by(EVENTS.c.seq.desc()).limit(limit))]

    def typed(self, run_id: str, prefix: str, *, after: int) -> tuple[int, Sequence[str]]:
        """The types, as far as they begin with `prefix`, of the run's own events behind `after`; and the last event."""
        last = self.last(run_id)
        new = (EVENTS.c.run_id == run_id) & (EVENTS.c.seq > after) & (EVENTS.c.seq <= last)
        query = sa.select(EVENTS.c.type).where(new, EVENTS.c.stream == "events", EVENTS.c.type.startswith(prefix))
        with self._database.reading() as db:
            return last, db.execute(query).scalars().all()

    def last(self, run_id: str) -> int:
        """The newest event's number; 0 before the first."""
        with self._database.reading() as db:
            return _last_seq(db, run_id)

    def metrics(self, run_id: str, *, after_step: int = 0) -> Sequence[dict[str, float | None]]:
        """What the run reported of each step that counts, in order: a step that was done again counts once.

        Of the steps up to `after_step` only the numbers are read, which is what makes following a long run cheap.
        """
        mine = (EVENTS.c.run_id == run_id) & (EVENTS.c.stream == "metrics")
        with self._database.reading(much=True) as db:
            number = sa.cast(EVENTS.c.data["step"].as_string(), sa.BigInteger)
            numbers = sa.select(number, EVENTS.c.report_seq).where(mine)
            counting: list[tuple[int, int]] = []
            for step, seq in db.execute(numbers.order_by(EVENTS.c.report_seq)):
                while counting and counting[-1][0] >= step:
                    counting.pop()
                counting.append((step, seq))
            wanted = {seq for step, seq in counting if step > after_step}
            if not wanted:
                return []
            rows = sa.select(EVENTS.c.report_seq, EVENTS.c.data).where(mine, EVENTS.c.report_seq >= min(wanted))
            return [row.data for row in db.execute(rows.order_by(EVENTS.c.report_seq)) if row.report_seq in wanted]

    def reported(self, run_id: str) -> dict[str, int]:
        """The last sequence number held of each of the run's own logs; 0 when it has reported nothing."""
        with self._database.reading() as db:
            newest = db.execute(_NEWEST, {"of": run_id}).one()
        return {stream: int(getattr(newest, stream)) for stream in STREAMS}


def is_much(limit: int, level: str | None = None, type: str | None = None) -> bool:
    """Whether events may take long to read: many of them, or those that have to be looked for among all others."""
    return limit > FEW or level is not None or type is not None


def note(db: sa.Connection, run_id: str, type: str, message: str, *, level: str = "info", **data: Any) -> None:
    """An event of the service's own."""
    event = {"time": time.time(), "type": type, "level": level, "message": message, "data": data}
    _insert(db, run_id, _last_seq(db, run_id) + 1, [{"stream": "service", "report_seq": None, **event}])


def note_state(db: sa.Connection, run_id: str, state: State, message: str, error: Mapping[str, Any] | None) -> None:
    """A change of state is an event too, so that whoever follows the events sees it in its place."""
    level = "error" if state is State.FAILED else "info"
    note(db, run_id, "run.status", message, level=level, status=state.value, error=error)


def append_logs(db: sa.Connection, run_id: str, report: Report) -> dict[str, int]:
    """Append what is new. Returns the last sequence number held of each log. Raises SequenceGap."""
    newest = db.execute(_NEWEST, {"of": run_id}).one()
    held = {stream: int(getattr(newest, stream)) for stream in STREAMS}
    fresh: list[dict[str, Any]] = []
    for stream, records in (("events", _of_events(report)), ("metrics", _of_metrics(report))):
        for record in records:
            if record["report_seq"] > held[stream] + 1:
                message = f"{stream}: record {record['report_seq']} came before {held[stream] + 1}"
                raise SequenceGap(message, 409, "sequence_gap", stream, held[stream] + 1)
            if record["report_seq"] == held[stream] + 1:
                fresh.append({"stream": stream, **record})
                held[stream] += 1
    _insert(db, run_id, int(newest.seq) + 1, fresh)
    return held


def _of_events(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "report_seq": event.seq,
            "time": event.time,
            "type": event.type,
            "level": event.level,
            "message": event.message,
            "data": event.data,
        }
        for event in report.events
    ]


def _of_metrics(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "report_seq": record.seq,
            "time": record.time,
            "type": "metrics",
            "level": "info",
            "message": f"step {record.step}",
            "data": record.values,
        }
        for record in report.metrics
    ]


def _last_seq(db: sa.Connection, run_id: str) -> int:
    return int(db.execute(_LAST, {"of": run_id}).scalar_one())


def _insert(db: sa.Connection, run_id: str, first: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Number the records and insert them. The caller holds the run's row, so no other writer takes the numbers."""
    if records:
        append(db, EVENTS, [{"run_id": run_id, "seq": seq, **one} for seq, one in enumerate(records, first)])


def _event(row: Any) -> Event:
    return Event(seq=row.seq, time=row.time, type=row.type, level=row.level, message=row.message, data=row.data)
