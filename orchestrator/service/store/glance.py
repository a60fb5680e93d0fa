"""A look at a database that is there: its revision, keys and teachers. Nothing is made, upgraded or locked.

Refuses to write: SQLite's file is opened for reading, PostgreSQL's session is read-only.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NoReturn

import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DBAPIError

from orchestrator.service.store.database import Database, Lanes
from orchestrator.service.store.keys import Key, Keys
from orchestrator.service.store.migrations import alembic_config
from orchestrator.service.store.pages import Page
from orchestrator.service.store.teachers import Teacher, Teachers
from potstill.errors import ConfigError

CONNECT_S = 5
SHOWN = 100  # of the teachers


class Glance(Database):
    """`url` as of Database. Raises ConfigError when the database cannot be opened."""

    def __init__(self, url: str) -> None:
        self._lease, self._lanes = None, Lanes()
        try:
            self.engine = _reading_engine(url)
            with self.engine.connect() as db:
                self.revision = MigrationContext.configure(db).get_current_revision()
        except (ArgumentError, DBAPIError, OSError, ModuleNotFoundError):
            raise ConfigError("the database cannot be opened: check --database and what it names") from None

    def writing(self) -> NoReturn:
        raise AssertionError("a glance only reads")

    @property
    def is_current(self) -> bool:
        """Whether it has the tables that this potstill knows. An older one is upgraded when it is served."""
        return self.revision == newest_revision()

    def keys(self) -> list[Key]:
        return Keys(self).list()

    def teachers(self) -> list[Teacher]:
        """The newest ones."""
        return Teachers(self).page(Page(limit=SHOWN))[0]


def newest_revision() -> str:
    """Of this potstill."""
    found = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert found is not None, "versions/ is in the package"
    return found


def knows_revision(revision: str) -> bool:
    """Whether this potstill can upgrade from there; it cannot where a newer one has been."""
    return revision in {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for a server's. Raises ConfigError for what is no URL."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise ConfigError("--database is no SQLAlchemy URL") from None
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def _reading_engine(url: str) -> sa.Engine:
    file = sqlite_file(url)
    if file is not None:
        name = f"{file.absolute().as_uri()}?mode=ro"
        return sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(name, uri=True))
    options = {"connect_timeout": CONNECT_S, "options": "-c default_transaction_read_only=on"}
    return sa.create_engine(url, connect_args=options)
