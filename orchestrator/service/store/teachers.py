"""Teachers that administrators registered: a [teacher] table each, whose secret is a reference, and its last probe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once, made_before, remember
from orchestrator.service.store.pages import Page, page_of
from orchestrator.service.store.schema import TEACHERS
from orchestrator.service.store.uses import require_unused
from potstill.errors import ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A registered teacher. Everybody who may read runs may name it in a run."""

    id: str
    key_id: str
    revision: int
    config: Mapping[str, Any]  # a [teacher] table
    probe: Mapping[str, Any] | None  # what was found of it, as `potstill teacher probe --json` prints it
    probed_at: float | None
    created_at: float


class Teachers:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, teacher_id: str, config: Mapping[str, Any], once: Once) -> tuple[Teacher, bool]:
        """Register one; the flag tells that the same request had done it before. Raises ServiceError: 409, 422."""
        row = {"id": teacher_id, "key_id": once.key_id, "revision": 1, "config": dict(config)}
        try:
            with self._database.writing() as db:
                if (earlier := made_before(db, once)) is not None:
                    return _teacher(_row(db, earlier)), True
                db.execute(TEACHERS.insert().values(row | {"created_at": time.time()}))
                remember(db, once, teacher_id)
                return _teacher(_row(db, teacher_id)), False
        except IntegrityError:
            message = f"a teacher named {teacher_id} exists: choose another name"
            raise ServiceError(message, 409, "name_taken") from None

    def get(self, teacher_id: str) -> Teacher:
        """Raises ServiceError (404)."""
        with self._database.reading() as db:
            return _teacher(_row(db, teacher_id))

    def page(self, wanted: Page) -> tuple[list[Teacher], bool]:
        with self._database.reading() as db:
            rows, more = page_of(db, TEACHERS, wanted)
        return [_teacher(row) for row in rows], more

    def change(self, teacher_id: str, config: Mapping[str, Any], *, revision: int) -> Teacher:
        """Put another table in its place; what was found of the old one is forgotten. Raises ServiceError: 404, 412."""
        with self._database.writing() as db:
            _check_revision(_row(db, teacher_id), revision)
            change = {"config": dict(config), "revision": revision + 1, "probe": None, "probed_at": None}
            db.execute(TEACHERS.update().where(TEACHERS.c.id == teacher_id).values(change))
            return _teacher(_row(db, teacher_id))

    def probed(self, teacher_id: str, found: Mapping[str, Any], *, revision: int) -> Teacher:
        """Keep what was found of a table. Raises ServiceError: 404, or 412 when another table has taken its place."""
        with self._database.writing() as db:
            _check_revision(_row(db, teacher_id), revision)
            change = {"probe": dict(found), "probed_at": time.time()}
            db.execute(TEACHERS.update().where(TEACHERS.c.id == teacher_id).values(change))
            return _teacher(_row(db, teacher_id))

    def delete(self, teacher_id: str) -> None:
        """Raises ServiceError: 404, or 409 while an unfinished run names it."""
        with self._database.writing() as db:
            _row(db, teacher_id)
            require_unused(db, TEACHERS, teacher_id)
            db.execute(TEACHERS.delete().where(TEACHERS.c.id == teacher_id))


def _row(db: sa.Connection, teacher_id: str) -> Any:
    query = sa.select(TEACHERS).where(TEACHERS.c.id == teacher_id).with_for_update()
    row = db.execute(query).first()
    if row is None:
        raise ServiceError("there is no such teacher", 404, "teacher_not_found")
    return row


def _check_revision(row: Any, revision: int) -> None:
    if row.revision != revision:
        raise ServiceError("the teacher has changed since: read it again", 412, "revision_mismatch")


def _teacher(row: Any) -> Teacher:
    return Teacher(**{name: value for name, value in row._mapping.items() if name != "number"})
