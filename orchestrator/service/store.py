"""The service's memory: runs, their events, and the hashes of keys. The only file with SQL.

SQLite in WAL mode with synchronous=FULL, so that what a client was told is on disk; the same statements run on
PostgreSQL, where row locks (FOR UPDATE) do what SQLite's single writer does. Every function is synchronous.
Refuses to keep a secret, to number events with gaps, to record one report twice, and to move a run against runs.MOVES.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError

from orchestrator.reporting import Report, ReportedStatus
from orchestrator.service.keys import HashedSecret, hashed, new_key, new_secret, split_key
from orchestrator.service.runs import Event, Failure, Run, SequenceGap, State, check_move
from potstill.errors import ConfigError, ServiceError

_META = sa.MetaData()
_RUNS = sa.Table(
    "runs",
    _META,
    sa.Column("number", sa.Integer, primary_key=True),  # order of creation; a cursor of the list
    sa.Column("id", sa.String(63), unique=True, nullable=False),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("submission_id", sa.String(100), unique=True, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("token_salt", sa.LargeBinary),
    sa.Column("token_digest", sa.LargeBinary),
)
_EVENTS = sa.Table(
    "events",
    _META,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("stream", sa.String(10), nullable=False),  # events | metrics: the run's own logs; service: ours
    sa.Column("report_seq", sa.BigInteger),  # its number in the run's own log
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("level", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.UniqueConstraint("run_id", "stream", "report_seq"),
)
_KEYS = sa.Table(
    "keys",
    _META,
    sa.Column("id", sa.String(20), primary_key=True),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)
_IDEMPOTENCY = sa.Table(
    "idempotency",
    _META,
    sa.Column("key_id", sa.String(20), primary_key=True),
    sa.Column("idempotency_key", sa.String(255), primary_key=True),
    sa.Column("body_digest", sa.String(64), nullable=False),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)
# Compared with when a key is unknown, so that the answer takes as long as for a known one.
_NOBODY = hashed(new_secret())


class Store:
    """One database. `url` is SQLAlchemy's: sqlite:////absolute/path.db or postgresql+psycopg://…"""

    def __init__(self, url: str) -> None:
        try:
            self._engine = sa.create_engine(url)
            if self._engine.dialect.name == "sqlite":
                _keep_private(self._engine.url.database)
                sa.event.listen(self._engine, "connect", _durable)
                sa.event.listen(self._engine, "begin", _lock_before_writing)
            _META.create_all(self._engine)
        except (ArgumentError, OperationalError, OSError, ModuleNotFoundError):
            raise ConfigError("the database cannot be opened: check --database and the folder it names") from None

    def close(self) -> None:
        self._engine.dispose()

    def ping(self) -> None:
        """Raises ServiceError (503) when the database does not answer."""
        with self._reading() as db:
            db.execute(sa.select(sa.literal(1)))

    # Keys

    def create_key(self, label: str) -> str:
        """Make an API key and keep its hash. The key itself is in the return value and nowhere else."""
        key, key_id, secret = new_key()
        kept = hashed(secret)
        row = {"id": key_id, "label": label, "salt": kept.salt, "digest": kept.digest, "created_at": time.time()}
        with self._writing() as db:
            db.execute(_KEYS.insert().values(row))
        return key

    def has_keys(self) -> bool:
        with self._reading() as db:
            return db.execute(sa.select(_KEYS.c.id).limit(1)).first() is not None

    def key_id_of(self, key: str) -> str | None:
        """The id of a valid API key; None for any other text."""
        key_id, secret = split_key(key) or ("", key)
        with self._reading() as db:
            row = db.execute(sa.select(_KEYS).where(_KEYS.c.id == key_id)).first()
        kept = HashedSecret(salt=row.salt, digest=row.digest) if row else _NOBODY
        return key_id if kept.matches(secret) and row else None

    def mint_token(self, run_id: str) -> str:
        """Make the token with which a run reports about itself. An earlier token of the run stops working."""
        token = new_secret()
        kept = hashed(token)
        with self._writing() as db:
            change = {"token_salt": kept.salt, "token_digest": kept.digest}
            db.execute(_RUNS.update().where(_RUNS.c.id == run_id).values(change))
        return token

    def token_matches(self, run_id: str, token: str) -> bool:
        with self._reading() as db:
            row = db.execute(sa.select(_RUNS).where(_RUNS.c.id == run_id)).first()
        if row is None or row.token_digest is None:
            return _NOBODY.matches(token)
        return HashedSecret(salt=row.token_salt, digest=row.token_digest).matches(token)

    # Runs

    def create_run(
        self, run_id: str, config: Mapping[str, Any], *, key_id: str, idempotency_key: str | None, body_digest: str
    ) -> tuple[Run, bool]:
        """Insert a queued run; on disk when this returns. The flag tells that the same request had made it before.

        Raises ServiceError: 409 name_taken, 422 idempotency_key_reused (same key, other body).
        """
        run = {"id": run_id, "status": State.QUEUED.value, "config": dict(config), "created_at": time.time()}
        try:
            with self._writing() as db:
                earlier = _earlier(db, key_id, idempotency_key, body_digest)
                if earlier is not None:
                    return _run(_row(db, earlier)), True
                db.execute(_RUNS.insert().values(run | {"submission_id": _submission_id(run_id)}))
                _note(db, run_id, State.QUEUED, "the run is stored and waits for the cluster", None)
                if idempotency_key is not None:
                    kept = {"key_id": key_id, "idempotency_key": idempotency_key, "body_digest": body_digest}
                    db.execute(_IDEMPOTENCY.insert().values(kept | {"run_id": run_id, "created_at": time.time()}))
                return _run(_row(db, run_id)), False
        except IntegrityError:
            raise ServiceError(f"a run named {run_id} exists: choose another name", 409, "name_taken") from None

    def get_run(self, run_id: str) -> Run:
        """Raises ServiceError (404) when there is no such run."""
        with self._reading() as db:
            return _run(_row(db, run_id))

    def has_run(self, run_id: str) -> bool:
        with self._reading() as db:
            return db.execute(sa.select(_RUNS.c.id).where(_RUNS.c.id == run_id)).first() is not None

    def list_runs(self, *, limit: int, after: str | None, ascending: bool) -> tuple[list[Run], bool]:
        """A page of runs in the order of their creation, and whether there are more. `after` is a run's id."""
        number = _RUNS.c.number
        query = sa.select(_RUNS).order_by(number.asc() if ascending else number.desc()).limit(limit + 1)
        with self._reading() as db:
            if after is not None:
                cursor = db.execute(sa.select(number).where(_RUNS.c.id == after)).scalar()
                if cursor is None:
                    raise ServiceError("`after` names no run", 400, "bad_cursor")
                query = query.where(number > cursor if ascending else number < cursor)
            rows = db.execute(query).all()
        return [_run(row) for row in rows[:limit]], len(rows) > limit

    def unfinished_runs(self) -> list[Run]:
        """Every run that is not in a final state, oldest first."""
        live = [state.value for state in State if not state.final]
        with self._reading() as db:
            rows = db.execute(sa.select(_RUNS).where(_RUNS.c.status.in_(live)).order_by(_RUNS.c.number)).all()
        return [_run(row) for row in rows]

    def move(self, run_id: str, state: State, message: str, failure: Failure | None = None) -> Run:
        """Change a run's state and record that as an event. Raises ServiceError: 404, or 409 illegal_transition."""
        with self._writing() as db:
            _move(db, _row(db, run_id, lock=True), state, message, failure, time.time())
            return _run(_row(db, run_id))

    def relaunch(self, run_id: str, message: str) -> None:
        """Have a run that lost its process wait for another one: its next job has a name of its own.

        Raises ServiceError: 404, or 409 illegal_transition for a run that is over or was asked to stop.
        """
        with self._writing() as db:
            row = _row(db, run_id, lock=True)
            if row.status != State.RECOVERING.value:
                _move(db, row, State.RECOVERING, message, None, time.time())
            renamed = {"submission_id": _submission_id(run_id)}
            db.execute(_RUNS.update().where(_RUNS.c.id == run_id).values(renamed))

    # Events

    def append(self, run_id: str, report: Report) -> dict[str, int]:
        """Take a run's report as a whole; a record that is already here is not taken twice.

        Returns the last sequence number held of each of the run's logs. A status that the run's state does not allow
        (it comes late, or again) changes nothing. Raises SequenceGap (409) and ServiceError (404).
        """
        with self._writing() as db:
            row = _row(db, run_id, lock=True)
            held = {}
            for stream, records in (("events", _events(report)), ("metrics", _metrics(report))):
                held[stream] = _append_log(db, run_id, stream, records)
            for status in report.statuses:
                row = _apply(db, row, status)
        return held

    def reported(self, run_id: str) -> dict[str, int]:
        """The last sequence number held of each of the run's own logs; 0 when it has reported nothing."""
        with self._reading() as db:
            return {stream: _last(db, run_id, stream) for stream in ("events", "metrics")}

    def list_events(self, run_id: str, *, after: int, limit: int) -> list[Event]:
        """Events with seq > after, in order."""
        query = sa.select(_EVENTS).where(_EVENTS.c.run_id == run_id, _EVENTS.c.seq > after)
        with self._reading() as db:
            rows = db.execute(query.order_by(_EVENTS.c.seq).limit(limit)).all()
        return [
            Event(seq=row.seq, time=row.time, type=row.type, level=row.level, message=row.message, data=row.data)
            for row in rows
        ]

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _database_errors(), self._engine.connect() as db:
            yield db

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with _database_errors(), self._engine.connect().execution_options(writes=True) as db, db.begin():
            yield db


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except OperationalError:
        raise ServiceError("the database is busy or away; try again", 503, "database_unavailable") from None


def _keep_private(path: str | None) -> None:
    """Only the owner reads the file. SQLite gives the same mode to the files that it keeps beside it."""
    if path and path != ":memory:":
        Path(path).touch(mode=0o600)


def _durable(connection: Any, _record: Any) -> None:
    """Set up a SQLite connection, and check that SQLite agreed: on some file systems it cannot do WAL."""
    connection.isolation_level = None  # transactions are begun by _lock_before_writing, not by the driver
    wanted = {"busy_timeout": 10_000, "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    for pragma, value in wanted.items():
        connection.execute(f"PRAGMA {pragma}={value}")
        (found,) = connection.execute(f"PRAGMA {pragma}").fetchone()
        if found != value:
            raise ConfigError(f"SQLite keeps {pragma}={found} here, not {value}: put the database on a local disk")


def _lock_before_writing(connection: sa.Connection) -> None:
    """A reader that turns writer in mid-transaction could not wait its turn; a writer asks for the lock at once."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _row(db: sa.Connection, run_id: str, *, lock: bool = False) -> Any:
    query = sa.select(_RUNS).where(_RUNS.c.id == run_id)
    row = db.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise ServiceError("there is no such run", 404, "run_not_found")
    return row


def _run(row: Any) -> Run:
    return Run(
        id=row.id,
        state=State(row.status),
        config=row.config,
        submission_id=row.submission_id,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=Failure(**row.error) if row.error is not None else None,
    )


def _earlier(db: sa.Connection, key_id: str, idempotency_key: str | None, body_digest: str) -> str | None:
    """The run that the same request made before."""
    mine = (_IDEMPOTENCY.c.key_id == key_id) & (_IDEMPOTENCY.c.idempotency_key == idempotency_key)
    row = db.execute(sa.select(_IDEMPOTENCY).where(mine)).first()
    if row is None:
        return None
    if row.body_digest != body_digest:
        message = "this Idempotency-Key was used with another body: use a new one"
        raise ServiceError(message, 422, "idempotency_key_reused")
    return str(row.run_id)


def _submission_id(run_id: str) -> str:
    return f"potstill-{run_id}-{secrets.token_hex(4)}"


def _move(db: sa.Connection, row: Any, state: State, message: str, failure: Failure | None, when: float) -> None:
    check_move(row.id, State(row.status), state)
    error = asdict(failure) if failure is not None else None
    change: dict[str, Any] = {"status": state.value, "error": error}
    if state is State.RUNNING and row.started_at is None:
        change["started_at"] = when
    if state.final:
        change["finished_at"] = when
    db.execute(_RUNS.update().where(_RUNS.c.id == row.id).values(change))
    _note(db, row.id, state, message, error)


def _note(db: sa.Connection, run_id: str, state: State, message: str, error: Mapping[str, Any] | None) -> None:
    """A change of state is an event too, so that whoever follows the events sees it in its place."""
    level = "error" if state is State.FAILED else "info"
    event = {"type": "run.status", "level": level, "message": message, "data": {"status": state.value, "error": error}}
    _insert(db, run_id, "service", [{"report_seq": None, "time": time.time(), **event}])


def _apply(db: sa.Connection, row: Any, reported: ReportedStatus) -> Any:
    wanted, error = State(reported.status.value), reported.error
    try:
        check_move(row.id, State(row.status), wanted)
    except ServiceError:
        return row
    failure = Failure(type=error.type, category=error.category, message=error.message) if error is not None else None
    _move(db, row, wanted, f"the run reports that it is {wanted}", failure, reported.time)
    return _row(db, row.id)


def _events(report: Report) -> list[dict[str, Any]]:
    return [event.model_dump(exclude={"seq"}) | {"report_seq": event.seq} for event in report.events]


def _metrics(report: Report) -> list[dict[str, Any]]:
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


def _append_log(db: sa.Connection, run_id: str, stream: str, records: Sequence[Mapping[str, Any]]) -> int:
    """Append what is new of one log. Returns the last sequence number held."""
    last = _last(db, run_id, stream)
    fresh = []
    for record in records:
        if record["report_seq"] > last + 1:
            message = f"{stream}: record {record['report_seq']} came before {last + 1}"
            raise SequenceGap(message, 409, "sequence_gap", stream, last + 1)
        if record["report_seq"] == last + 1:
            fresh.append(record)
            last += 1
    _insert(db, run_id, stream, fresh)
    return last


def _last(db: sa.Connection, run_id: str, stream: str) -> int:
    newest = sa.select(sa.func.max(_EVENTS.c.report_seq))
    found = db.execute(newest.where(_EVENTS.c.run_id == run_id, _EVENTS.c.stream == stream)).scalar()
    return 0 if found is None else int(found)


def _insert(db: sa.Connection, run_id: str, stream: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Number the records and insert them. The caller holds the run's row, so no other writer takes the numbers."""
    found = db.execute(sa.select(sa.func.max(_EVENTS.c.seq)).where(_EVENTS.c.run_id == run_id)).scalar()
    first = 1 if found is None else int(found) + 1
    rows = [
        {"run_id": run_id, "stream": stream, "seq": seq, **record} for seq, record in enumerate(records, start=first)
    ]
    if rows:
        db.execute(_EVENTS.insert(), rows)
