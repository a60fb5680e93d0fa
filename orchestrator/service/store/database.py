"""One database and its transactions: SQLite in WAL mode with synchronous=FULL, or PostgreSQL; the same statements.

What a client was told is on disk. SQLite has a single writer; PostgreSQL's row locks (FOR UPDATE) do the same there.
A database `under` a lease writes only while that lease is held: the fence is read in the same transaction.
Refuses a database that cannot be durable, and a schema that is newer than this code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.util.concurrency import in_greenlet

from orchestrator.service.store.engines import LoopEngines, open_engine
from orchestrator.service.store.migrations import upgrade
from orchestrator.service.store.schema import LEASES
from orchestrator.service.store.turns import Turns
from potstill.errors import ConfigError, Fenced, ServiceError


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
        self._loops = LoopEngines(url)
        try:
            self.engine = open_engine(url)
            upgrade(self.engine)
        except (ArgumentError, OperationalError, OSError, ModuleNotFoundError):
            raise ConfigError("the database cannot be opened: check --database and what it names") from None

    def under(self, lease: Lease) -> Database:
        """The same database for the holder of `lease`: its writes raise Fenced once another holds it."""
        fenced = object.__new__(Database)
        fenced.engine, fenced._loops, fenced._lanes, fenced._lease = self.engine, self._loops, self._lanes, lease
        return fenced

    def close(self) -> None:
        self.engine.dispose()

    async def leave_loop(self) -> None:
        """Close the connections on which functions of this event loop have waited (waits.py)."""
        await self._loops.leave()

    @property
    def is_near(self) -> bool:
        """Whether it is asked within this process: a read waits for no server."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self, *, much: bool = False) -> Iterator[sa.Connection]:
        """Each statement sees what is there when it runs. `much`: it may take long, and others go past it meanwhile."""
        with _away(), self._lanes.much if much else self._lanes.statements, self._connect() as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction: all of it is on disk when the block has ended, or none of it."""
        with (
            _away(),
            self._lanes.writers,
            self._connect().execution_options(writes=True) as db,
            db.begin(),
            self._lanes.statements,  # left first: others read while the disk syncs
        ):
            if self._lease is not None:
                _check(db, self._lease)
            yield db

    def _connect(self) -> sa.Connection:
        """By a driver that waits as the caller does: its thread, or its greenlet in an event loop."""
        return (self._loops.engine() if in_greenlet() else self.engine).connect()


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
