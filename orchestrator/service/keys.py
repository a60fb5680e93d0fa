"""Bearer secrets: how they are made, what is kept of them, and how they are compared.

Keeps a salt and a hash, never the secret. A secret holds 256 random bits, so one round of SHA-256 is as strong as it
is; slow hashes are for passwords that people choose, which this file refuses to handle.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedSecret:
    """What may lie in a database."""

    salt: bytes
    digest: bytes

    def matches(self, secret: str) -> bool:
        """Compare in a time that does not depend on where the two differ."""
        return hmac.compare_digest(self.digest, _digest(self.salt, secret))


def new_secret() -> str:
    return secrets.token_urlsafe(32)


def hashed(secret: str) -> HashedSecret:
    salt = secrets.token_bytes(16)
    return HashedSecret(salt=salt, digest=_digest(salt, secret))


def new_key(key_id: str | None = None) -> tuple[str, str, str]:
    """An API key for its owner, and its two halves: the id that finds its row, a new one by default, and the secret."""
    key_id, secret = key_id or secrets.token_hex(6), new_secret()
    return f"ps_{key_id}_{secret}", key_id, secret


def split_key(key: str) -> tuple[str, str] | None:
    """The id and the secret of an API key; None when it is not shaped like one."""
    found = re.fullmatch(r"ps_([0-9a-f]{12})_([A-Za-z0-9_-]{43})", key)
    return (found[1], found[2]) if found else None


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode("utf-8", "surrogatepass")).digest()


class Signer:
    """Makes the tokens with which runs report about themselves. Keeps one secret of the service's own, and no token.

    A token belongs to one job of one run: whoever launches a job again gives it the same token, and the token of an
    earlier job is worth nothing, so that a job that was given up cannot report.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @property
    def fingerprint(self) -> str:
        """Tells this service from others; says nothing of its secret."""
        return hmac.new(self._secret, b"fingerprint", hashlib.sha256).hexdigest()[:16]

    def token(self, submission_id: str) -> str:
        return hmac.new(self._secret, submission_id.encode(), hashlib.sha256).hexdigest()

    def matches(self, submission_id: str, token: str) -> bool:
        return hmac.compare_digest(self.token(submission_id).encode(), token.encode("utf-8", "surrogatepass"))
