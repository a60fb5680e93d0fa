"""The calls about API keys, and who changed what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from potstill.client.answers import as_object, path
from potstill.client.resources import Audited, Key, Page
from potstill.client.runs import idempotency
from potstill.client.steps import Call


def who_am_i() -> Call[Key]:
    """The key that asks: its owner, scopes and limits, and what it has used."""
    return Call(method="GET", path="/v1/me", reads=as_object)


def create_key(
    *,
    owner: str,
    label: str = "",
    scopes: Sequence[str] = ("runs:read", "runs:write"),
    limits: Mapping[str, float] | None = None,
    expires_in_s: float | None = None,
    idempotency_key: str | None = None,
) -> Call[Key]:
    """Make a key. Its `key` is in the first answer alone; an answer without it: the first was lost (`rotate_key`)."""
    body: dict[str, Any] = {"owner": owner, "label": label, "scopes": list(scopes), "limits": dict(limits or {})}
    if expires_in_s is not None:
        body["expires_in_s"] = expires_in_s
    return Call(method="POST", path="/v1/keys", body=body, headers=idempotency(idempotency_key), reads=as_object)


def list_keys() -> Call[Page[Key]]:
    """Every key, the ended ones too."""
    return Call(method="GET", path="/v1/keys", reads=as_object)


def get_key(key_id: str) -> Call[Key]:
    """One key, and what it has used."""
    return Call(method="GET", path=path("v1", "keys", key_id), reads=as_object)


def update_key(key_id: str, *, limits: Mapping[str, float]) -> Call[Key]:
    """Set a key's limits, all of them: those that are left out are lifted."""
    return Call(method="PATCH", path=path("v1", "keys", key_id), body={"limits": dict(limits)}, reads=as_object)


def rotate_key(key_id: str) -> Call[Key]:
    """Give a key another secret, in this answer alone; the old one ends at once."""
    return Call(method="POST", path=path("v1", "keys", key_id, "rotate"), body={}, reads=as_object)


def revoke_key(key_id: str) -> Call[Key]:
    """End a key. Its runs go on."""
    return Call(method="DELETE", path=path("v1", "keys", key_id), reads=as_object)


def list_audit(*, limit: int = 100, before: int | None = None) -> Call[Page[Audited]]:
    """Who changed what, newest first; `before` is the last_id of the page before."""
    return Call(method="GET", path="/v1/audit", params={"limit": limit, "before": before}, reads=as_object)
