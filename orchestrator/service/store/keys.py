"""API keys and browser sessions: hashes, owners, scopes, limits, ends. The secrets themselves are returned once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from orchestrator.service.keys import HashedSecret, hashed, new_key, new_secret, split_key
from orchestrator.service.principals import Limits, Principal, Scope
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once, made_before, remember
from orchestrator.service.store.schema import KEYS, SESSIONS
from potstill.errors import ServiceError

# Compared with when a key is unknown, so that the answer takes as long as for a known one.
_NOBODY = hashed(new_secret())
_BY_ID = sa.select(KEYS).where(KEYS.c.id == sa.bindparam("key"))  # asked by every request: built once


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What may be shown of a key."""

    id: str
    label: str
    principal: Principal
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    @property
    def lives(self) -> bool:
        return _lives(self)


class Keys:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        *,
        owner: str,
        label: str,
        scopes: Iterable[Scope],
        limits: Limits | None = None,
        expires_at: float | None = None,
        once: Once | None = None,
    ) -> tuple[Key, str | None]:
        """Make a key and keep its hash. The second of the two is the key itself, which is nowhere else.

        None for a request that made it before: what was shown once is not kept. Raises ServiceError (422).
        """
        text, key_id, secret = new_key()
        kept = hashed(secret)
        row = {
            "id": key_id,
            "owner": owner,
            "label": label,
            "scopes": sorted(scope.value for scope in scopes),
            "limits": (limits or Limits()).model_dump(exclude_none=True),
            "salt": kept.salt,
            "digest": kept.digest,
            "created_at": time.time(),
            "expires_at": expires_at,
        }
        try:
            with self._database.writing() as db:
                if (earlier := _made_before(db, once)) is not None:
                    return earlier, None
                db.execute(KEYS.insert().values(row))
                if once is not None:
                    remember(db, once, key_id)
                return _key(_row(db, key_id)), text
        except IntegrityError:  # another connection was first with the same request
            with self._database.reading() as db:
                earlier = _made_before(db, once)
            if earlier is None:
                raise
            return earlier, None

    def change(self, key_id: str, *, limits: Limits) -> Key:
        """Set what a key may use. Raises ServiceError (404)."""
        with self._database.writing() as db:
            _row(db, key_id)
            change = {"limits": limits.model_dump(exclude_none=True)}
            db.execute(KEYS.update().where(KEYS.c.id == key_id).values(change))
            return _key(_row(db, key_id))

    def rotate(self, key_id: str) -> tuple[Key, str]:
        """Give a key another secret: the old one stops working, its runs, scopes, limits and sessions' owner stay."""
        text, _, secret = new_key(key_id)
        kept = hashed(secret)
        with self._database.writing() as db:
            _row(db, key_id)
            db.execute(KEYS.update().where(KEYS.c.id == key_id).values(salt=kept.salt, digest=kept.digest))
            db.execute(SESSIONS.delete().where(SESSIONS.c.key_id == key_id))
            return _key(_row(db, key_id)), text

    def revoke(self, key_id: str) -> Key:
        """End a key and its sessions. Its runs go on. To revoke it again changes nothing."""
        with self._database.writing() as db:
            if _row(db, key_id).revoked_at is None:
                db.execute(KEYS.update().where(KEYS.c.id == key_id).values(revoked_at=time.time()))
            db.execute(SESSIONS.delete().where(SESSIONS.c.key_id == key_id))
            return _key(_row(db, key_id))

    def list(self) -> list[Key]:
        with self._database.reading() as db:
            return [_key(row) for row in db.execute(sa.select(KEYS).order_by(KEYS.c.number))]

    def any(self) -> bool:
        with self._database.reading() as db:
            return db.execute(sa.select(KEYS.c.id).limit(1)).first() is not None

    def get(self, key_id: str) -> Key:
        with self._database.reading() as db:
            return _key(_row(db, key_id))

    def bearer(self, text: str) -> Principal | None:
        """Whose key this is; None for any other text, and for a key that has expired or was revoked."""
        key_id, secret = split_key(text) or ("", text)
        with self._database.reading() as db:
            row = db.execute(_BY_ID, {"key": key_id}).first()
        kept = HashedSecret(salt=row.salt, digest=row.digest) if row else _NOBODY
        return _key(row).principal if kept.matches(secret) and row and _lives(row) else None

    def open_session(self, key_id: str, seconds: float) -> str:
        """A secret for a browser's cookie, in a key's name. It ends with the key, and after `seconds`."""
        secret, now = new_secret(), time.time()
        with self._database.writing() as db:
            db.execute(SESSIONS.delete().where(SESSIONS.c.expires_at < now))
            db.execute(SESSIONS.insert().values(digest=_digest(secret), key_id=key_id, expires_at=now + seconds))
        return secret

    def session(self, secret: str) -> Principal | None:
        """Whose session this is; None when it has ended."""
        query = sa.select(KEYS).join(SESSIONS, SESSIONS.c.key_id == KEYS.c.id)
        with self._database.reading() as db:
            mine = (SESSIONS.c.digest == _digest(secret)) & (SESSIONS.c.expires_at > time.time())
            row = db.execute(query.where(mine)).first()
        return _key(row).principal if row and _lives(row) else None

    def close_session(self, secret: str) -> None:
        with self._database.writing() as db:
            db.execute(SESSIONS.delete().where(SESSIONS.c.digest == _digest(secret)))


def _digest(secret: str) -> bytes:
    """A session is found by its digest: 256 random bits need no salt, and a digest leads back to none of them."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _made_before(db: sa.Connection, once: Once | None) -> Key | None:
    made = None if once is None else made_before(db, once)
    return None if made is None else _key(_row(db, made))


def _row(db: sa.Connection, key_id: str) -> Any:
    row = db.execute(_BY_ID, {"key": key_id}).first()
    if row is None:
        raise ServiceError("there is no such key", 404, "key_not_found")
    return row


def _lives(row: Any) -> bool:
    return row.revoked_at is None and (row.expires_at is None or row.expires_at > time.time())


def _key(row: Any) -> Key:
    scopes = frozenset(Scope(name) for name in row.scopes)
    return Key(
        id=row.id,
        label=row.label,
        principal=Principal(key_id=row.id, owner=row.owner, scopes=scopes, limits=Limits(**row.limits)),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
