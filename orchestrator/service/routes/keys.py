"""API keys, who is asking, and the audit log."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.service.principals import Limits, Principal, Scope
from orchestrator.service.routes.asking import Admin, Auditing, IdempotencyKey, Stored, created, listed, once, principal
from orchestrator.service.runs import rfc3339
from orchestrator.service.store.keys import Key
from potstill.errors import ServiceError

router = APIRouter(prefix="/v1", tags=["keys"])


class NewKey(BaseModel):
    """Of a key that shall be made."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    owner: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """Whose runs it sees: a person or a team. Several keys may have one owner."""
    label: Annotated[str, Field(max_length=100)] = ""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=20)] = [Scope.RUNS_READ, Scope.RUNS_WRITE]
    limits: Limits = Limits()
    expires_in_s: Annotated[float, Field(gt=0, le=10 * 365 * 86400)] | None = None


class ChangedKey(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    limits: Limits


@router.get("/me", operation_id="who_am_i")
def who_am_i(who: Annotated[Principal, Depends(principal)], store: Stored) -> dict[str, Any]:
    """The key that asks: its owner, scopes, limits, and what its runs have used."""
    return _key_resource(store.keys.get(who.key_id)) | {"usage": _usage(store, who.key_id)}


@router.post("/keys", status_code=201, operation_id="create_key")
def create_key(
    body: NewKey, who: Admin, store: Stored, audit: Auditing, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Make a key. The key itself is in this answer and nowhere else: a request that comes again is answered without.

    Whoever lost the first answer rotates the key.
    """
    expires_at = None if body.expires_in_s is None else time.time() + body.expires_in_s
    key, text = store.keys.create(
        owner=body.owner,
        label=body.label,
        scopes=body.scopes,
        limits=body.limits,
        expires_at=expires_at,
        once=once(who, idempotency_key, "/v1/keys", body.model_dump(mode="json")),
    )
    if text is not None:
        audit(who, "key.create", key.id, owner=body.owner, scopes=[scope.value for scope in body.scopes])
    shown = {} if text is None else {"key": text}
    answer = created(_key_resource(key) | shown, f"/v1/keys/{key.id}", replayed=text is None)
    answer.headers["Cache-Control"] = "no-store"
    return answer


@router.get("/keys", operation_id="list_keys")
def list_keys(_who: Admin, store: Stored) -> dict[str, Any]:
    """Every key, the ended ones too."""
    return listed([_key_resource(key) for key in store.keys.list()], False)


@router.get("/keys/{key_id}", operation_id="get_key")
def get_key(key_id: str, _who: Admin, store: Stored) -> dict[str, Any]:
    return _key_resource(store.keys.get(key_id)) | {"usage": _usage(store, key_id)}


@router.patch("/keys/{key_id}", operation_id="update_key")
def update_key(key_id: str, body: ChangedKey, who: Admin, store: Stored, audit: Auditing) -> dict[str, Any]:
    """Set a key's limits, all of them: those that are left out are lifted."""
    key = store.keys.change(key_id, limits=body.limits)
    audit(who, "key.update", key_id, limits=body.limits.model_dump(exclude_none=True))
    return _key_resource(key)


@router.post("/keys/{key_id}/rotate", operation_id="rotate_key")
def rotate_key(key_id: str, who: Admin, store: Stored, audit: Auditing) -> JSONResponse:
    """Give a key another secret, shown in this answer alone; the old one and every browser session of it end."""
    key, text = store.keys.rotate(key_id)
    audit(who, "key.rotate", key_id)
    return JSONResponse(_key_resource(key) | {"key": text}, headers={"Cache-Control": "no-store"})


@router.delete("/keys/{key_id}", operation_id="revoke_key")
def revoke_key(key_id: str, who: Admin, store: Stored, audit: Auditing) -> dict[str, Any]:
    """End a key. Its runs go on. The key that asks cannot end itself."""
    if key_id == who.key_id:
        raise ServiceError("a key does not revoke itself: use another administrator's", 409, "own_key")
    key = store.keys.revoke(key_id)
    audit(who, "key.revoke", key_id)
    return _key_resource(key)


@router.get("/audit", operation_id="list_audit")
def list_audit(
    _who: Admin,
    store: Stored,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, lt=2**53)] = None,
) -> dict[str, Any]:
    """Who changed what, newest first; `before` is the number of the last record of the page before."""
    records = store.audit.list(limit=limit + 1, before=before)
    shown = [record | {"object_type": "audit", "time": rfc3339(record["time"])} for record in records[:limit]]
    return listed(shown, len(records) > limit, "number")


def _usage(store: Any, key_id: str) -> dict[str, Any]:
    return asdict(store.runs.usage(key_id))


def _key_resource(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "key",
        "owner": key.principal.owner,
        "label": key.label,
        "scopes": sorted(scope.value for scope in key.principal.scopes),
        "limits": key.principal.limits.model_dump(exclude_none=True),
        "created_at": rfc3339(key.created_at),
        "expires_at": rfc3339(key.expires_at),
        "revoked_at": rfc3339(key.revoked_at),
    }
