"""Connections to the database, and how each is set up.

    SQLite         in WAL mode with synchronous=FULL, for threads
    PostgreSQL     for threads, and, in an engine of its own for each event loop, for greenlets in it (waits.py)

The drivers begin no transaction: a read is one journey to the database, and whoever writes begins one.
Refuses a SQLite that cannot be durable.
"""

from __future__ import annotations

import asyncio
import select
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from potstill.errors import ConfigError

POOL: dict[str, Any] = {"pool_size": 10, "pool_use_lifo": True}  # kept open; warm ones first
MORE = 50  # opened when that many threads ask at once: there are 40 for requests
MORE_IN_LOOP = 10  # there who waits for a connection costs nothing
LOCK_WAIT_MS = 10_000  # that a writer waits for another one
IDLE_MS = 3_000  # in a transaction, before PostgreSQL ends it: each of ours takes milliseconds
_BEGIN = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "BEGIN"}
_POSTGRES: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    "connect_args": {
        # A process that freezes in the middle of a transaction would hold its locks for ever.
        "options": f"-c idle_in_transaction_session_timeout={IDLE_MS} -c lock_timeout={LOCK_WAIT_MS}",
        "connect_timeout": 10,
    },
}


def open_engine(url: str) -> sa.Engine:
    """For threads."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        _keep_private(parsed.database)
        engine = sa.create_engine(parsed, poolclass=sa.QueuePool, max_overflow=MORE, **POOL)
        sa.event.listen(engine, "connect", _durable)
    else:
        engine = sa.create_engine(parsed, max_overflow=MORE, **POOL, **_POSTGRES)
        sa.event.listen(engine, "checkout", _still_there)
    sa.event.listen(engine, "begin", _begin_to_write)
    return engine


class LoopEngines:
    """Of one PostgreSQL database: a connection belongs to the event loop that waits on it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._of: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = WeakKeyDictionary()

    def engine(self) -> sa.Engine:
        """The running loop's, for functions that wait in a greenlet."""
        loop = asyncio.get_running_loop()
        if loop not in self._of:
            url = sa.make_url(self._url).set(drivername="postgresql+psycopg")
            opened = create_async_engine(url, max_overflow=MORE_IN_LOOP, **POOL, **_POSTGRES)
            sa.event.listen(opened.sync_engine, "checkout", _still_there)
            sa.event.listen(opened.sync_engine, "begin", _begin_to_write)
            self._of[loop] = opened
        return self._of[loop].sync_engine

    async def leave(self) -> None:
        """Close what the running loop has open."""
        opened = self._of.pop(asyncio.get_running_loop(), None)
        if opened is not None:
            await opened.dispose()


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


def _still_there(_connection: Any, record: Any, _proxy: Any) -> None:
    """Whether the server has ended a connection that nobody used: its last word is there to be read.

    To ask the server (`pool_pre_ping`) would be a journey before every read.
    """
    unread = select.poll()
    unread.register(record.driver_connection.fileno(), select.POLLIN)
    if unread.poll(0):
        raise DisconnectionError("the server has ended this connection")


def _begin_to_write(connection: sa.Connection) -> None:
    """SQLite's takes the lock at once: a reader that turns writer in mid-transaction could not wait its turn."""
    if connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql(_BEGIN[connection.dialect.name])
