"""What a run's folder does not say of its checkpoints: until when they are kept, as what they were published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from orchestrator.service.store.database import Database
from orchestrator.service.store.schema import CHECKPOINTS
from potstill.errors import ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """Of one checkpoint."""

    expires_at: float | None = None
    published_as: str | None = None
    deleted_at: float | None = None


class Checkpoints:
    def __init__(self, database: Database) -> None:
        self._database = database

    def of_run(self, run_id: str) -> dict[str, Keeping]:
        """By the checkpoint's name; those of which nothing is known are absent."""
        query = sa.select(CHECKPOINTS).where(CHECKPOINTS.c.run_id == run_id)
        with self._database.reading() as db:
            return {row.name: _keeping(row) for row in db.execute(query)}

    def note(self, run_id: str, name: str, **changes: Any) -> Keeping:
        """Set `expires_at`, `published_as` or `deleted_at`. Raises ServiceError (409) for a name that is published."""
        mine = (CHECKPOINTS.c.run_id == run_id) & (CHECKPOINTS.c.name == name)
        try:
            with self._database.writing() as db:
                if db.execute(CHECKPOINTS.update().where(mine).values(changes)).rowcount == 0:
                    db.execute(CHECKPOINTS.insert().values({"run_id": run_id, "name": name, **changes}))
                return _keeping(db.execute(sa.select(CHECKPOINTS).where(mine)).one())
        except IntegrityError:
            raise ServiceError("that name is published already: choose another", 409, "name_taken") from None

    def expired(self, now: float) -> list[tuple[str, str]]:
        """(run, checkpoint) of those whose time is over and that are still there."""
        over = (CHECKPOINTS.c.expires_at <= now) & CHECKPOINTS.c.deleted_at.is_(None)
        with self._database.reading() as db:
            rows = db.execute(sa.select(CHECKPOINTS.c.run_id, CHECKPOINTS.c.name).where(over)).all()
        return [(row.run_id, row.name) for row in rows]


def _keeping(row: Any) -> Keeping:
    return Keeping(expires_at=row.expires_at, published_as=row.published_as, deleted_at=row.deleted_at)
