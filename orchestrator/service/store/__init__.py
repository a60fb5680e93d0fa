"""The service's memory: the only package with SQL. One class a table, over one database; every function is synchronous.

Refuses to keep a secret, to number events with gaps, to record one report twice, to move a run against runs.MOVES, and
to show a principal what belongs to another owner.
"""

from __future__ import annotations

import sqlalchemy as sa

from orchestrator.service.store.audit import Audit
from orchestrator.service.store.checkpoints import Checkpoints
from orchestrator.service.store.database import Database, Lease
from orchestrator.service.store.events import Events
from orchestrator.service.store.files import Files
from orchestrator.service.store.keys import Keys
from orchestrator.service.store.leases import Leases
from orchestrator.service.store.runs import Runs
from orchestrator.service.store.teachers import Teachers


class Store:
    """All tables over one database. `Store(Database(url))`; close it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.keys = Keys(database)
        self.runs = Runs(database)
        self.events = Events(database)
        self.checkpoints = Checkpoints(database)
        self.files = Files(database)
        self.teachers = Teachers(database)
        self.leases = Leases(database)
        self.audit = Audit(database)

    def under(self, lease: Lease) -> Store:
        """The same tables for the holder of a lease: writes raise Fenced once another holds it."""
        return Store(self.database.under(lease))

    def ping(self) -> None:
        """Raises ServiceError (503) when the database does not answer."""
        with self.database.reading() as db:
            db.execute(sa.select(sa.literal(1)))

    def close(self) -> None:
        self.database.close()
