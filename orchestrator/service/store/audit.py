"""Who changed what, when: appended by every route that changes something, read by administrators, never changed."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import sqlalchemy as sa

from orchestrator.service.principals import Principal
from orchestrator.service.store.database import Database
from orchestrator.service.store.schema import AUDIT


class Audit:
    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self,
        who: Principal,
        action: str,
        object: str,
        *,
        request_id: str,
        within: sa.Connection | None = None,
        **detail: Any,
    ) -> None:
        """`action` is dotted and stable, e.g. "run.cancel"; `object` an id. No secret may be in `detail`.

        `within`: the transaction that makes the change, with which the record is on disk or is not.
        """
        row = {"time": time.time(), "key_id": who.key_id, "owner": who.owner, "action": action, "object": object}
        with self._database.writing() if within is None else nullcontext(within) as db:
            db.execute(AUDIT.insert(), row | {"request_id": request_id, "detail": detail})

    def list(self, *, limit: int, before: int | None) -> list[dict[str, Any]]:
        """Records, newest first; `before` is the number of the last one of the page before."""
        query = sa.select(AUDIT).order_by(AUDIT.c.number.desc()).limit(limit)
        if before is not None:
            query = query.where(AUDIT.c.number < before)
        with self._database.reading() as db:
            return [dict(row._mapping) for row in db.execute(query)]
