"""From any released schema to the present one, by alembic: one file a revision in versions/, applied in a transaction.

Refuses to go back: a database that a newer potstill has opened is not opened by an older one.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from potstill.errors import ConfigError

_LOCK = 0x706F7473  # of PostgreSQL: two services that start at once upgrade one after the other


def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Bring the database to `revision`. Raises ConfigError when it is of a newer potstill than this."""
    with engine.connect().execution_options(writes=True) as db, db.begin():
        if db.dialect.name == "postgresql":
            db.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        config = alembic_config()
        config.attributes["connection"] = db
        try:
            command.upgrade(config, revision)
        except CommandError:
            known = ScriptDirectory.from_config(config).get_current_head()
            raise ConfigError(
                f"the database is of a newer potstill; this one knows it up to revision {known}"
            ) from None


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config
