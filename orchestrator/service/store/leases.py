"""Leases: one holder at a time, while it renews, by the database's clock. A change of holder raises the token."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from orchestrator.service.store.database import Database, Lease, now
from orchestrator.service.store.schema import LEASES


class Leases:
    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, name: str, holder: str, seconds: float) -> Lease | None:
        """Take or renew a lease for `seconds`. None while another holds it."""
        try:
            with self._database.writing() as db:
                return _take(db, name, holder, seconds)
        except IntegrityError:  # two took one that nobody had held before; the other was first
            return None

    def give_back(self, lease: Lease) -> None:
        """Let the next one take it at once. Nothing happens when another holds it already."""
        held = (LEASES.c.name == lease.name) & (LEASES.c.token == lease.token)
        with self._database.writing() as db:
            db.execute(LEASES.update().where(held).values(expires_at=0.0))


def _take(db: sa.Connection, name: str, holder: str, seconds: float) -> Lease | None:
    row = db.execute(sa.select(LEASES).where(LEASES.c.name == name).with_for_update()).first()
    time = now(db)
    if row is None:
        db.execute(LEASES.insert().values(name=name, holder=holder, token=1, expires_at=time + seconds))
        return Lease(name=name, holder=holder, token=1)
    if row.holder != holder and row.expires_at > time:
        return None
    # Who comes back after its lease ran out gets a new token too: what it did in between may have been overtaken.
    token = row.token if row.holder == holder and row.expires_at > time else row.token + 1
    change = {"holder": holder, "token": token, "expires_at": time + seconds}
    db.execute(LEASES.update().where(LEASES.c.name == name).values(change))
    return Lease(name=name, holder=holder, token=token)
