"""One database and its transactions: SQLite in WAL mode with synchronous=FULL, or PostgreSQL; the same statements.

What a client was told is on disk. SQLite has a single writer; PostgreSQL's row locks (FOR UPDATE) do the same there.
A database `under` a lease writes only while that lease is held: the fence is read in the same transaction.
Refuses a database that cannot be durable, and a schema that is newer than this code.
"""

from __future__ import annotations

import select
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from orchestrator.service.store.migrations import upgrade
from orchestrator.service.store.schema import LEASES
from orchestrator.service.store.turns import Turns
from potstill.errors import ConfigError, Fenced, ServiceError

CONNECTIONS, MORE = 10, 50  # kept open, and opened when that many threads ask at once: there are 40 for requests
LOCK_WAIT_MS = 10_000  # that a writer waits for another one
_BEGIN = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "BEGIN"}
IDLE_MS = 3_000  # in a transaction, before PostgreSQL ends it: each of ours takes milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """That one process may do something alone. `token` is the fence: a later holder has a larger one."""

    name: str
    holder: str
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """In which threads go one after the other; on PostgreSQL nobody waits here."""

    writers: AbstractContextManager[Any] = field(default_factory=nullcontext)
    statements: AbstractContextManager[Any] = field(default_factory=nullcontext)
    much: AbstractContextManager[Any] = field(default_factory=nullcontext)


def _one_at_a_time() -> Lanes:
    """For SQLite. Its writers would sleep within it, and starve each other. And its driver gives the interpreter away
    with every row: threads that read side by side wait for each other at each of them (decision 0018)."""
    return Lanes(writers=Turns(), statements=Turns(), much=Turns())


class Database:
    """`url` is SQLAlchemy's: sqlite:////absolute/path.db or postgresql+psycopg://…  Raises ConfigError."""

    def __init__(self, url: str) -> None:
        self._lease: Lease | None = None
        self._lanes = _one_at_a_time() if url.startswith("sqlite") else Lanes()
        try:
            self.engine = _engine(url)
            upgrade(self.engine)
        except (ArgumentError, OperationalError, OSError, ModuleNotFoundError):
            raise ConfigError("the database cannot be opened: check --database and what it names") from None

    def under(self, lease: Lease) -> Database:
        """The same database for the holder of `lease`: its writes raise Fenced once another holds it."""
        fenced = object.__new__(Database)
        fenced.engine, fenced._lanes, fenced._lease = self.engine, self._lanes, lease
        return fenced

    def close(self) -> None:
        self.engine.dispose()

    @property
    def is_near(self) -> bool:
        """Whether it is asked within this process: a read waits for no server."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self, *, much: bool = False) -> Iterator[sa.Connection]:
        """Each statement sees what is there when it runs. `much`: it may take long, and others go past it meanwhile."""
        with _away(), self._lanes.much if much else self._lanes.statements, self.engine.connect() as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction: all of it is on disk when the block has ended, or none of it."""
        with (
            _away(),
            self._lanes.writers,
            self.engine.connect().execution_options(writes=True) as db,
            db.begin(),
            self._lanes.statements,  # left first: others read while the disk syncs
        ):
            if self._lease is not None:
                _check(db, self._lease)
            yield db


def now(db: sa.Connection) -> float:
    """The database's clock, which all who share the database agree on."""
    if db.dialect.name == "sqlite":
        return float(db.exec_driver_sql("SELECT (julianday('now') - 2440587.5) * 86400.0").scalar_one())
    return float(db.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())


def append(db: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows that have every column.

    PostgreSQL's driver would send one row after the other, and give the interpreter away at each: there all of them
    are one JSON text.
    """
    if db.dialect.name == "sqlite":
        db.execute(table.insert(), rows)
    else:
        db.execute(_insert_of_json(table), {"rows": rows})


@cache
def _insert_of_json(table: sa.Table) -> sa.Insert:
    text = sa.bindparam("rows", type_=sa.JSON)
    columns = [sa.column(column.name, column.type) for column in table.columns]
    read = sa.func.json_to_recordset(text).table_valued(*columns).render_derived(with_types=True)
    return table.insert().from_select([column.name for column in columns], sa.select(*read.columns))


def _check(db: sa.Connection, lease: Lease) -> None:
    row = db.execute(sa.select(LEASES).where(LEASES.c.name == lease.name).with_for_update()).first()
    if row is None or row.token != lease.token:
        raise Fenced(f"{lease.name}: another process has taken over; this one writes nothing more")


def _engine(url: str) -> sa.Engine:
    """The driver begins no transaction: a read is one journey to the database, and whoever writes begins one."""
    parsed = sa.make_url(url)
    pool: dict[str, Any] = {"pool_size": CONNECTIONS, "max_overflow": MORE, "pool_use_lifo": True}  # warm ones first
    if parsed.get_backend_name() == "sqlite":
        _keep_private(parsed.database)
        engine = sa.create_engine(parsed, poolclass=sa.QueuePool, **pool)
        sa.event.listen(engine, "connect", _durable)
    else:
        # A process that freezes in the middle of a transaction would hold its locks for ever.
        limits = f"-c idle_in_transaction_session_timeout={IDLE_MS} -c lock_timeout={LOCK_WAIT_MS}"
        arguments = {"options": limits, "connect_timeout": 10}
        engine = sa.create_engine(parsed, isolation_level="AUTOCOMMIT", connect_args=arguments, **pool)
        sa.event.listen(engine, "checkout", _still_there)
    sa.event.listen(engine, "begin", _begin_to_write)
    return engine


@contextmanager
def _away() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except DataError:  # of PostgreSQL: a null character is no text there
        raise ServiceError("a text holds a character that the database cannot keep", 400, "invalid_text") from None
    except PoolTimeout:
        raise ServiceError("too much is asked of the database; try again", 503, "database_unavailable") from None
    except (OperationalError, DBAPIError) as error:
        if isinstance(error, OperationalError) or error.connection_invalidated:
            raise ServiceError("the database is busy or away; try again", 503, "database_unavailable") from None
        raise


def _keep_private(path: str | None) -> None:
    """Only the owner reads the file. SQLite gives the same mode to the files that it keeps beside it."""
    if path and path != ":memory:":
        Path(path).touch(mode=0o600)


def _durable(connection: Any, _record: Any) -> None:
    """Set up a SQLite connection, and check that SQLite agreed: on some file systems it cannot do WAL."""
    connection.isolation_level = None  # transactions are begun by _begin_to_write
    wanted = {"busy_timeout": LOCK_WAIT_MS, "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    for pragma, value in wanted.items():
        connection.execute(f"PRAGMA {pragma}={value}")
        (found,) = connection.execute(f"PRAGMA {pragma}").fetchone()
        if found != value:
            raise ConfigError(f"SQLite keeps {pragma}={found} here, not {value}: put the database on a local disk")


def _still_there(connection: Any, _record: Any, _proxy: Any) -> None:
    """Whether the server has ended a connection that nobody used: its last word is there to be read.

    To ask the server (`pool_pre_ping`) would be a journey before every read.
    """
    unread = select.poll()
    unread.register(connection.fileno(), select.POLLIN)
    if unread.poll(0):
        raise DisconnectionError("the server has ended this connection")


def _begin_to_write(connection: sa.Connection) -> None:
    """SQLite's takes the lock at once: a reader that turns writer in mid-transaction could not wait its turn."""
    if connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql(_BEGIN[connection.dialect.name])
