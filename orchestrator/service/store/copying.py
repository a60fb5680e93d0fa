"""All rows of one database into another: from SQLite to PostgreSQL and back, or a backup while the service goes on.

The copy is the source at one moment, and is there as a whole or not at all. Numbers go on behind the last one copied.
Refuses a source that another version of potstill wrote, and a destination that holds anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from orchestrator.service.store.database import Database
from orchestrator.service.store.glance import Glance
from orchestrator.service.store.schema import META
from potstill.errors import ConfigError

ROWS = 500  # at a time


def copy(source: str, destination: str) -> dict[str, int]:
    """Rows copied, by table. Both are SQLAlchemy URLs. Raises ConfigError; nothing is copied then."""
    glance = Glance(source)
    if not glance.is_current:
        raise ConfigError("another version of potstill wrote the database: serve it once with this one, then copy")
    database = Database(destination)
    try:
        with _at_one_moment(glance.engine) as old, database.writing() as new:
            held = [table.name for table in META.sorted_tables if new.execute(sa.select(table).limit(1)).first()]
            if held:
                raise ConfigError(f"--to: that database holds {', '.join(held)} already: name an empty one")
            return {table.name: _copy_table(table, old, new) for table in META.sorted_tables}
    finally:
        database.close()
        glance.engine.dispose()


@contextmanager
def _at_one_moment(engine: sa.Engine) -> Iterator[sa.Connection]:
    if engine.dialect.name == "sqlite":
        with engine.connect() as db:
            db.exec_driver_sql("BEGIN")  # the driver itself begins at the first write only
            yield db
    else:
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as db:
            yield db


def _copy_table(table: sa.Table, old: sa.Connection, new: sa.Connection) -> int:
    count = 0
    for rows in old.execution_options(yield_per=ROWS).execute(sa.select(table)).mappings().partitions():
        new.execute(table.insert(), [dict(row) for row in rows])
        count += len(rows)
    numbered = table.autoincrement_column
    if numbered is not None and new.dialect.name == "postgresql":  # which counts by itself, wherever rows came from
        sequence = sa.func.pg_get_serial_sequence(table.name, numbered.name)
        last = sa.func.max(numbered)
        new.execute(sa.select(sa.func.setval(sequence, sa.func.coalesce(last, 1), last.is_not(None))))
    return count
