"""What a request that is sent twice made the first time: kept in the transaction that makes it, found before it.

Refuses one Idempotency-Key for two different requests (422).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from orchestrator.service.store.schema import IDEMPOTENCY
from potstill.errors import ServiceError

RETAINED_S = 7 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """A request that makes something: who sends it, where to, and a digest of its body. `key` None: never replayed."""

    key_id: str
    key: str | None
    route: str
    body_digest: str


def made_before(db: sa.Connection, once: Once) -> str | None:
    """The id of what the same request made. Raises ServiceError (422) for another request under the same key."""
    if once.key is None:
        return None
    mine = (IDEMPOTENCY.c.key_id == once.key_id) & (IDEMPOTENCY.c.idempotency_key == once.key)
    row = db.execute(sa.select(IDEMPOTENCY).where(mine)).first()
    if row is None:
        return None
    if (row.route, row.body_digest) != (once.route, once.body_digest):
        message = "this Idempotency-Key was used with another request: use a new one"
        raise ServiceError(message, 422, "idempotency_key_reused")
    return str(row.made)


def remember(db: sa.Connection, once: Once, made: str) -> None:
    """Keep what was made, and forget what is older than RETAINED_S."""
    if once.key is None:
        return
    now = time.time()
    db.execute(IDEMPOTENCY.delete().where(IDEMPOTENCY.c.created_at < now - RETAINED_S))
    kept = {"key_id": once.key_id, "idempotency_key": once.key, "route": once.route, "body_digest": once.body_digest}
    db.execute(IDEMPOTENCY.insert().values(kept | {"made": made, "created_at": now}))
