"""Runs: made once for each request, moved along runs.MOVES, each change of state an event in the same transaction.

Every write locks the run's row first, so that the numbers of its events have one writer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from orchestrator.reporting import Report, ReportedStatus
from orchestrator.service.principals import Principal
from orchestrator.service.runs import RETRIED, Failure, ResolvedRun, Run, State, check_move, config_sha256
from orchestrator.service.scheduling import Usage
from orchestrator.service.store.database import Database
from orchestrator.service.store.events import append_logs, note, note_state
from orchestrator.service.store.idempotency import Once, made_before, remember
from orchestrator.service.store.pages import Page, page_of, visible
from orchestrator.service.store.schema import KEYS, RUNS
from orchestrator.service.store.uses import require_named
from potstill.errors import ServiceError

Admission = Callable[[sa.Connection], None]
"""Asked within the transaction that makes a run; raises ServiceError when its key may have no more."""

_STORED = "the run is stored and waits for its turn"
# Statements of every report, every follower and every creation are built once.
_OF = RUNS.c.id == sa.bindparam("of")
_JOB = sa.select(RUNS.c.submission_id).where(_OF)
_STATE = sa.select(RUNS.c.id, RUNS.c.status, RUNS.c.started_at, RUNS.c.launched_at, RUNS.c.busy_s).where(_OF)
_STATE_LOCKED = _STATE.with_for_update()
_HEARD = RUNS.update().where(_OF)
_CREATED = RUNS.insert().returning(RUNS)
_UNRESOLVED = [column for column in RUNS.c if column is not RUNS.c.config]  # what the lists have of a run


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


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """What is stored of a submission."""

    id: str
    submitted: Mapping[str, Any]
    config: Mapping[str, Any]
    owner: str
    gpus: float = 0.0
    priority: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    forked_from: str | None = None
    forked_checkpoint: str | None = None


class Runs:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, new: NewRun, once: Once, admission: Admission = lambda _db: None) -> tuple[ResolvedRun, bool]:
        """Insert a queued run; on disk when this returns. The flag tells that the same request had made it before.

        Raises ServiceError: 409 name_taken, or deleted for a file or teacher that it names; 422 idempotency_key_reused;
        and what `admission` raises.
        """
        now = time.time()
        row = {one.name: getattr(new, one.name) for one in fields(new)} | {
            "key_id": once.key_id,
            "status": State.QUEUED.value,
            "status_since": now,
            "status_message": _STORED,
            "config_sha256": config_sha256(new.config),
            "submission_id": _submission_id(new.id),
            "attempt": 1,
            "revision": 1,
            "step": 0,
            "latest": {},
            "created_at": now,
            "busy_s": 0.0,
            "teacher_tokens": 0,
            "teacher_usd": 0.0,
        }
        try:
            with self._database.writing() as db:
                if (earlier := made_before(db, once)) is not None:
                    return run_of(_row(db, earlier)), True
                db.execute(sa.select(KEYS.c.id).where(KEYS.c.id == once.key_id).with_for_update())  # one at a time
                admission(db)
                require_named(db, new.submitted)
                stored = db.execute(_CREATED, row).one()
                remember(db, once, new.id)
                note_state(db, new.id, State.QUEUED, _STORED, None)
                return run_of(stored), False
        except IntegrityError:
            return self._lost_race(new.id, once)

    def _lost_race(self, run_id: str, once: Once) -> tuple[ResolvedRun, bool]:
        """Another connection was first: with the same request, or with another one under the same name."""
        with self._database.reading() as db:
            if (earlier := made_before(db, once)) is not None:
                return run_of(_row(db, earlier)), True
        message = f"a run named {run_id} exists: choose another name"
        raise ServiceError(message, 409, "name_taken")

    def get(self, run_id: str, viewer: Principal | None = None) -> ResolvedRun:
        """Raises ServiceError (404) when there is no such run for the viewer. None is the service itself."""
        with self._database.reading() as db:
            return run_of(_row(db, run_id, viewer))

    def require(self, run_id: str, viewer: Principal) -> None:
        """Raises ServiceError (404) when there is no such run for the viewer."""
        with self._database.reading() as db:
            if db.execute(sa.select(RUNS.c.id).where(RUNS.c.id == run_id, visible(RUNS, viewer))).first() is None:
                raise _no_such_run()

    def state(self, run_id: str) -> State:
        """Raises ServiceError (404)."""
        with self._database.reading() as db:
            return State(_state_row(db, run_id).status)

    def job(self, run_id: str) -> str | None:
        """The submission id of a run's present job; None when there is no such run."""
        with self._database.reading() as db:
            found = db.execute(_JOB, {"of": run_id}).scalar()
        return None if found is None else str(found)

    def exists(self, run_id: str) -> bool:
        with self._database.reading() as db:
            return db.execute(sa.select(RUNS.c.id).where(RUNS.c.id == run_id)).first() is not None

    def page(
        self,
        viewer: Principal | None,
        wanted: Page,
        *,
        states: Sequence[State] = (),
        metadata: Mapping[str, str] | None = None,
        created_after: float | None = None,
        named: str = "",
    ) -> tuple[list[Run], bool]:
        """A page of runs in the order of their creation, and whether there are more. `named`: a part of their ids.

        What is looked for among all runs may take long to find.
        """
        where = [visible(RUNS, viewer)]
        if states:
            where.append(RUNS.c.status.in_([state.value for state in states]))
        if created_after is not None:
            where.append(RUNS.c.created_at > created_after)
        if named:
            where.append(RUNS.c.id.contains(named, autoescape=True))
        where += [self._carries(name, value) for name, value in (metadata or {}).items()]
        with self._database.reading(much=len(where) > 1) as db:
            rows, more = page_of(db, RUNS, wanted, *where, columns=_UNRESOLVED)
        return [Run(**_read(row)) for row in rows], more

    def _carries(self, name: str, value: str) -> sa.ColumnElement[bool]:
        """Whether a run has this pair of metadata. The name is compared, and never part of a JSON path."""
        each = sa.func.json_each if self._database.engine.dialect.name == "sqlite" else sa.func.json_each_text
        pairs = each(RUNS.c.metadata).table_valued("key", "value")
        mine = sa.select(sa.literal(1)).select_from(pairs).where(pairs.c.key == name, pairs.c.value == value)
        return mine.correlate(RUNS).exists()

    def steered(self, jobs: Collection[str]) -> list[Run]:
        """Runs that have processes, or may have, and those that wait although one of `jobs` is theirs; oldest first."""
        active = RUNS.c.status.in_([state.value for state in State if state.active])
        waits = RUNS.c.status.in_([State.QUEUED.value, State.PAUSED.value]) & RUNS.c.submission_id.in_(jobs)
        with self._database.reading() as db:
            rows = db.execute(sa.select(*_UNRESOLVED).where(active | waits).order_by(RUNS.c.number)).all()
        return [Run(**_read(row)) for row in rows]

    def in_line(self, limit: int, *, but: Collection[str]) -> list[Run]:
        """The first queued runs of keys other than `but`: the highest priority first, then the oldest."""
        waiting = sa.select(*_UNRESOLVED).where(RUNS.c.status == State.QUEUED.value, RUNS.c.key_id.not_in(but))
        first = waiting.order_by(RUNS.c.priority.desc(), RUNS.c.created_at).limit(limit)
        with self._database.reading() as db:
            rows = db.execute(first).all()
        return [Run(**_read(row)) for row in rows]

    def unfinished(self) -> list[ResolvedRun]:
        """Every run that is not in a final state, oldest first."""
        live = [state.value for state in State if not state.final]
        with self._database.reading() as db:
            rows = db.execute(sa.select(RUNS).where(RUNS.c.status.in_(live)).order_by(RUNS.c.number)).all()
        return [run_of(row) for row in rows]

    def counts(self) -> dict[State, int]:
        """How many runs are in each state, the empty ones included."""
        query = sa.select(RUNS.c.status, sa.func.count()).group_by(RUNS.c.status)
        with self._database.reading() as db:
            found = {State(status): int(count) for status, count in db.execute(query)}
        return dict.fromkeys(State, 0) | found

    def usage(self, key_id: str, db: sa.Connection | None = None) -> Usage:
        """What all runs of a key have used, and hold; within the transaction of `db`, when it is given."""
        if db is not None:
            return _usage(db, key_id)
        with self._database.reading() as reading:
            return _usage(reading, key_id)

    def edit(self, run_id: str, viewer: Principal, changes: Mapping[str, Any], *, revision: int) -> ResolvedRun:
        """Change priority, metadata or notes. Raises ServiceError: 404, 409 (final run), 412 (old revision)."""
        with self._database.writing() as db:
            row = _row(db, run_id, viewer, lock=True)
            if State(row.status).final:
                raise ServiceError(f"run {run_id} is {row.status}, which is final", 409, "run_is_final")
            if row.revision != revision:
                raise ServiceError("the run has changed since: read it again", 412, "revision_mismatch")
            db.execute(RUNS.update().where(RUNS.c.id == run_id).values({**changes, "revision": revision + 1}))
            return run_of(_row(db, run_id))

    def move(
        self, run_id: str, state: State, message: str, failure: Failure | None = None, viewer: Principal | None = None
    ) -> ResolvedRun:
        """Change a run's state and record that as an event. Raises ServiceError: 404, or 409 illegal_transition."""
        with self._database.writing() as db:
            _move(db, _row(db, run_id, viewer, lock=True), state, message, failure, time.time())
            return run_of(_row(db, run_id))

    def launched(self, run_id: str) -> None:
        """The cluster has the run's job: from now on it uses what it asked for."""
        with self._database.writing() as db:
            row = _row(db, run_id, lock=True)
            _move(db, row, State.STARTING, "the job is submitted to the cluster", None, time.time())

    def again(self, run_id: str, message: str, viewer: Principal | None = None, *, retry: bool = False) -> ResolvedRun:
        """Have a run wait for another process, whose job has a name of its own.

        A run that lost its process recovers; one that is paused, or, as a `retry`, at a bad end, is queued.
        Raises ServiceError: 404, or 409 illegal_transition.
        """
        with self._database.writing() as db:
            row = _row(db, run_id, viewer, lock=True)
            current = State(row.status)
            if retry and current not in RETRIED:
                message = f"run {run_id} is {current}: only a run that failed or was cancelled is retried"
                raise ServiceError(message, 409, "illegal_transition")
            wanted = State.QUEUED if retry or current is State.PAUSED else State.RECOVERING
            if current is not wanted:
                _move(db, row, wanted, message, None, time.time(), retry=retry)
            renamed = {"submission_id": _submission_id(run_id), "attempt": row.attempt + 1}
            db.execute(RUNS.update().where(RUNS.c.id == run_id).values(renamed))
            return run_of(_row(db, run_id))

    def spent(self, run_id: str, *, teacher_tokens: int, teacher_usd: float) -> None:
        """What its black-box teachers have cost so far, in all."""
        with self._database.writing() as db:
            change = {"teacher_tokens": teacher_tokens, "teacher_usd": teacher_usd}
            db.execute(RUNS.update().where(RUNS.c.id == run_id).values(change))

    def remark(self, run_id: str, type: str, message: str, *, level: str = "info", **data: Any) -> None:
        """An event of the service's own that changes no state."""
        with self._database.writing() as db:
            _row(db, run_id, lock=True)
            note(db, run_id, type, message, level=level, **data)

    def delete(self, run_id: str, viewer: Principal) -> None:
        """Forget a run that is at its end, with its events. Raises ServiceError: 404, 409 while it is not."""
        with self._database.writing() as db:
            row = _row(db, run_id, viewer, lock=True)
            if not State(row.status).final:
                raise ServiceError(f"run {run_id} is {row.status}: cancel it first", 409, "run_is_active")
            for table in RUNS.metadata.sorted_tables:
                if "run_id" in table.c:
                    db.execute(table.delete().where(table.c.run_id == run_id))
            db.execute(RUNS.delete().where(RUNS.c.id == run_id))

    def report(self, run_id: str, report: Report) -> dict[str, int]:
        """Take a run's report as a whole; a record that is already here is not taken twice.

        Returns the last sequence number held of each of the run's logs. A status that the run's state does not allow
        (it comes late, or again) changes nothing. Raises SequenceGap (409) and ServiceError (404).
        """
        with self._database.writing() as db:
            row = _state_row(db, run_id, lock=True)
            held = append_logs(db, run_id, report)
            heard: dict[str, Any] = {"heartbeat_at": time.time()}
            if report.metrics:
                newest = report.metrics[-1]
                heard |= {"step": newest.step, "latest": newest.values}
            if report.statuses:
                heard["code_version"] = report.statuses[-1].code_version
            db.execute(_HEARD, {"of": run_id, **heard})
            for status in report.statuses:
                row = _apply(db, row, status)
        return held


def _usage(db: sa.Connection, key_id: str) -> Usage:
    row = db.execute(_USAGE, {"key": key_id, "now": time.time()}).one()
    return Usage(
        runs=int(row.runs),
        unfinished=int(row.unfinished),
        running=int(row.running),
        gpu_hours=float(row.gpu_hours),
        teacher_tokens=int(row.teacher_tokens),
        teacher_usd=float(row.teacher_usd),
    )


def run_of(row: Any) -> ResolvedRun:
    """A row of the table as the run it describes."""
    return ResolvedRun(**_read(row))


def _read(row: Any) -> dict[str, Any]:
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


def _row(db: sa.Connection, run_id: str, viewer: Principal | None = None, *, lock: bool = False) -> Any:
    query = sa.select(RUNS).where(RUNS.c.id == run_id, visible(RUNS, viewer))
    row = db.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise _no_such_run()
    return row


def _state_row(db: sa.Connection, run_id: str, *, lock: bool = False) -> Any:
    """What a change of state asks of a run, without what its client wrote."""
    row = db.execute(_STATE_LOCKED if lock else _STATE, {"of": run_id}).first()
    if row is None:
        raise _no_such_run()
    return row


def _no_such_run() -> ServiceError:
    return ServiceError("there is no such run", 404, "run_not_found")


def _submission_id(run_id: str) -> str:
    return f"potstill-{run_id}-{secrets.token_hex(4)}"


def _move(
    db: sa.Connection,
    row: Any,
    state: State,
    message: str,
    failure: Failure | None,
    when: float,
    *,
    retry: bool = False,
) -> None:
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


def _apply(db: sa.Connection, row: Any, reported: ReportedStatus) -> Any:
    """Move a run as it reports. One that was asked to pause and stopped is paused, not cancelled."""
    current, wanted, error = State(row.status), State(reported.status.value), reported.error
    if current is State.PAUSING and wanted is State.CANCELLED:
        wanted = State.PAUSED
    try:
        check_move(row.id, current, wanted)
    except ServiceError:
        return row
    failure = Failure(type=error.type, category=error.category, message=error.message) if error is not None else None
    _move(db, row, wanted, f"the run reports that it is {wanted}", failure, reported.time)
    return _state_row(db, row.id)
