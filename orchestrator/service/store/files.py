"""Files that clients uploaded: what is known of each. Their bytes lie in a folder of the service's (uploads.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from orchestrator.service.principals import Limits, Principal
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once, made_before, remember
from orchestrator.service.store.pages import Page, page_of, visible
from orchestrator.service.store.schema import FILES, KEYS
from orchestrator.service.store.uses import require_unused
from potstill.errors import ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An uploaded file that was read to its end and found sound."""

    id: str  # "file-" and hexadecimal digits
    owner: str
    key_id: str
    filename: str  # as its owner calls it
    purpose: str
    format: str  # jsonl | parquet, as it was sent
    bytes: int
    sha256: str
    rows: int
    columns: Sequence[str]
    created_at: float


@dataclass(frozen=True, slots=True)
class Room:
    """What a key keeps, of what it may keep, in bytes."""

    kept: int
    most: float

    def require(self, size: int) -> None:
        """Raises ServiceError (429, quota_exceeded) when `size` bytes more are too many."""
        if self.kept + size > self.most:
            message = f"this key's limit of stored_bytes is reached: {self.kept} of {self.most} are used; delete files"
            raise ServiceError(message, 429, "quota_exceeded")


class Files:
    def __init__(self, database: Database) -> None:
        self._database = database

    def earlier(self, once: Once) -> File | None:
        """What the same request made before. Raises ServiceError (422) for another one under the same key."""
        with self._database.reading() as db:
            made = made_before(db, once)
            return None if made is None else _file(_row(db, made, None))

    def add(self, file: File, once: Once, limits: Limits) -> tuple[File, bool]:
        """Keep it; the flag tells that the same request had made another before.

        Raises ServiceError: 422 idempotency_key_reused, 429 quota_exceeded.
        """
        try:
            with self._database.writing() as db:
                if (made := made_before(db, once)) is not None:
                    return _file(_row(db, made, None)), True
                db.execute(sa.select(KEYS.c.id).where(KEYS.c.id == file.key_id).with_for_update())  # one at a time
                _room(db, file.key_id, limits).require(file.bytes)
                db.execute(FILES.insert().values(asdict(file) | {"columns": list(file.columns)}))
                remember(db, once, file.id)
        except IntegrityError:  # another connection was first with the same request
            earlier = self.earlier(once)
            if earlier is None:
                raise
            return earlier, True
        return file, False

    def room(self, who: Principal) -> Room:
        """What is left for this key, as long as nothing else comes."""
        with self._database.reading() as db:
            return _room(db, who.key_id, who.limits)

    def get(self, file_id: str, viewer: Principal | None) -> File:
        """Raises ServiceError (404) when there is no such file for the viewer."""
        with self._database.reading() as db:
            return _file(_row(db, file_id, viewer))

    def page(self, viewer: Principal | None, wanted: Page, *, purpose: str | None = None) -> tuple[list[File], bool]:
        where = [visible(FILES, viewer)] + ([] if purpose is None else [FILES.c.purpose == purpose])
        with self._database.reading() as db:
            rows, more = page_of(db, FILES, wanted, *where)
        return [_file(row) for row in rows], more

    def exists(self, file_id: str) -> bool:
        with self._database.reading() as db:
            return db.execute(sa.select(FILES.c.id).where(FILES.c.id == file_id)).first() is not None

    def delete(self, file_id: str, viewer: Principal | None) -> None:
        """Forget a file. Raises ServiceError: 404, or 409 while an unfinished run names it."""
        with self._database.writing() as db:
            _row(db, file_id, viewer, lock=True)
            require_unused(db, FILES, file_id)
            db.execute(FILES.delete().where(FILES.c.id == file_id))


def new_file_id(sha256: str) -> str:
    return f"file-{sha256[:12]}{time.time_ns():x}"


def _room(db: sa.Connection, key_id: str, limits: Limits) -> Room:
    kept = sa.select(sa.func.coalesce(sa.func.sum(FILES.c.bytes), 0)).where(FILES.c.key_id == key_id)
    return Room(db.execute(kept).scalar_one(), limits.stored_bytes)


def _row(db: sa.Connection, file_id: str, viewer: Principal | None, *, lock: bool = False) -> Any:
    query = sa.select(FILES).where(FILES.c.id == file_id, visible(FILES, viewer))
    row = db.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise ServiceError("there is no such file", 404, "file_not_found")
    return row


def _file(row: Any) -> File:
    return File(**{name: value for name, value in row._mapping.items() if name != "number"})
