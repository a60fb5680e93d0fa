"""Runs: made once for each request, moved along runs.MOVES, each change of state an event in the same transaction.

Every write locks the run's row first, so that the numbers of its events have one writer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from orchestrator.reporting import Report
from orchestrator.service.principals import Principal
from orchestrator.service.runs import RETRIED, Failure, ResolvedRun, Run, State, config_sha256
from orchestrator.service.scheduling import Usage
from orchestrator.service.store.database import Database
from orchestrator.service.store.events import append_logs, note, note_state
from orchestrator.service.store.idempotency import Once, made_before, remember
from orchestrator.service.store.moves import apply_status, move_row
from orchestrator.service.store.pages import Page, page_of, visible
from orchestrator.service.store.run_rows import OF, UNRESOLVED, fields_in, no_such_run, row_of, run_of, state_row
from orchestrator.service.store.schema import KEYS, RUNS
from orchestrator.service.store.usage import usage_of
from orchestrator.service.store.uses import require_named
from potstill.errors import ServiceError

Admission = Callable[[sa.Connection], None]
"""Asked within the transaction that makes a run; raises ServiceError when its key may have no more."""

_STORED = "the run is stored and waits for its turn"
# Statements of every report and every creation are built once.
_JOB = sa.select(RUNS.c.submission_id).where(OF)
_HEARD = RUNS.update().where(OF)
_CREATED = RUNS.insert().returning(RUNS)


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
                    return run_of(row_of(db, earlier)), True
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
                return run_of(row_of(db, earlier)), True
        message = f"a run named {run_id} exists: choose another name"
        raise ServiceError(message, 409, "name_taken")

    def get(self, run_id: str, viewer: Principal | None = None) -> ResolvedRun:
        """Raises ServiceError (404) when there is no such run for the viewer. None is the service itself."""
        with self._database.reading() as db:
            return run_of(row_of(db, run_id, viewer))

    def require(self, run_id: str, viewer: Principal) -> None:
        """Raises ServiceError (404) when there is no such run for the viewer."""
        with self._database.reading() as db:
            if db.execute(sa.select(RUNS.c.id).where(RUNS.c.id == run_id, visible(RUNS, viewer))).first() is None:
                raise no_such_run()

    def state(self, run_id: str) -> State:
        """Raises ServiceError (404)."""
        with self._database.reading() as db:
            return State(state_row(db, run_id).status)

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
            rows, more = page_of(db, RUNS, wanted, *where, columns=UNRESOLVED)
        return [Run(**fields_in(row)) for row in rows], more

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
            rows = db.execute(sa.select(*UNRESOLVED).where(active | waits).order_by(RUNS.c.number)).all()
        return [Run(**fields_in(row)) for row in rows]

    def in_line(self, limit: int, *, but: Collection[str]) -> list[Run]:
        """The first queued runs of keys other than `but`: the highest priority first, then the oldest."""
        waiting = sa.select(*UNRESOLVED).where(RUNS.c.status == State.QUEUED.value, RUNS.c.key_id.not_in(but))
        first = waiting.order_by(RUNS.c.priority.desc(), RUNS.c.created_at).limit(limit)
        with self._database.reading() as db:
            rows = db.execute(first).all()
        return [Run(**fields_in(row)) for row in rows]

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
            return usage_of(db, key_id)
        with self._database.reading() as reading:
            return usage_of(reading, key_id)

    def edit(self, run_id: str, viewer: Principal, changes: Mapping[str, Any], *, revision: int) -> ResolvedRun:
        """Change priority, metadata or notes. Raises ServiceError: 404, 409 (final run), 412 (old revision)."""
        with self._database.writing() as db:
            row = row_of(db, run_id, viewer, lock=True)
            if State(row.status).final:
                raise ServiceError(f"run {run_id} is {row.status}, which is final", 409, "run_is_final")
            if row.revision != revision:
                raise ServiceError("the run has changed since: read it again", 412, "revision_mismatch")
            db.execute(RUNS.update().where(RUNS.c.id == run_id).values({**changes, "revision": revision + 1}))
            return run_of(row_of(db, run_id))

    def move(
        self, run_id: str, state: State, message: str, failure: Failure | None = None, viewer: Principal | None = None
    ) -> ResolvedRun:
        """Change a run's state and record that as an event. Raises ServiceError: 404, or 409 illegal_transition."""
        with self._database.writing() as db:
            move_row(db, row_of(db, run_id, viewer, lock=True), state, message, failure, time.time())
            return run_of(row_of(db, run_id))

    def launched(self, run_id: str) -> None:
        """The cluster has the run's job: from now on it uses what it asked for."""
        with self._database.writing() as db:
            row = row_of(db, run_id, lock=True)
            move_row(db, row, State.STARTING, "the job is submitted to the cluster", None, time.time())

    def again(self, run_id: str, message: str, viewer: Principal | None = None, *, retry: bool = False) -> ResolvedRun:
        """Have a run wait for another process, whose job has a name of its own.

        A run that lost its process recovers; one that is paused, or, as a `retry`, at a bad end, is queued.
        Raises ServiceError: 404, or 409 illegal_transition.
        """
        with self._database.writing() as db:
            row = row_of(db, run_id, viewer, lock=True)
            current = State(row.status)
            if retry and current not in RETRIED:
                message = f"run {run_id} is {current}: only a run that failed or was cancelled is retried"
                raise ServiceError(message, 409, "illegal_transition")
            wanted = State.QUEUED if retry or current is State.PAUSED else State.RECOVERING
            if current is not wanted:
                move_row(db, row, wanted, message, None, time.time(), retry=retry)
            renamed = {"submission_id": _submission_id(run_id), "attempt": row.attempt + 1}
            db.execute(RUNS.update().where(RUNS.c.id == run_id).values(renamed))
            return run_of(row_of(db, run_id))

    def spent(self, run_id: str, *, teacher_tokens: int, teacher_usd: float) -> None:
        """What its black-box teachers have cost so far, in all."""
        with self._database.writing() as db:
            change = {"teacher_tokens": teacher_tokens, "teacher_usd": teacher_usd}
            db.execute(RUNS.update().where(RUNS.c.id == run_id).values(change))

    def remark(self, run_id: str, type: str, message: str, *, level: str = "info", **data: Any) -> None:
        """An event of the service's own that changes no state."""
        with self._database.writing() as db:
            row_of(db, run_id, lock=True)
            note(db, run_id, type, message, level=level, **data)

    def delete(self, run_id: str, viewer: Principal) -> None:
        """Forget a run that is at its end, with its events. Raises ServiceError: 404, 409 while it is not."""
        with self._database.writing() as db:
            row = row_of(db, run_id, viewer, lock=True)
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
            row = state_row(db, run_id, lock=True)
            held = append_logs(db, run_id, report)
            heard: dict[str, Any] = {"heartbeat_at": time.time()}
            if report.metrics:
                newest = report.metrics[-1]
                heard |= {"step": newest.step, "latest": newest.values}
            if report.statuses:
                heard["code_version"] = report.statuses[-1].code_version
            db.execute(_HEARD, {"of": run_id, **heard})
            for status in report.statuses:
                row = apply_status(db, row, status)
        return held


def _submission_id(run_id: str) -> str:
    return f"potstill-{run_id}-{secrets.token_hex(4)}"
