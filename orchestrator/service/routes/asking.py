"""What every route may depend on: who asks, with which right, over which store; pages, idempotency, the audit log.

Refuses a key that lacks the scope that the route names. Whether there is one at all the gate has asked. What waits for
nothing is `async`: FastAPI sends everything else through a thread, one after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Header, Query, Request
from fastapi.responses import JSONResponse

from orchestrator.service.principals import Principal, Scope
from orchestrator.service.state import ServiceState
from orchestrator.service.store import Store
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.pages import Page
from potstill.errors import ServiceError


async def the_state(request: Request) -> ServiceState:
    state: ServiceState = request.app.state.service
    return state


State = Annotated[ServiceState, Depends(the_state)]


async def the_store(state: State) -> Store:
    return state.store


Stored = Annotated[Store, Depends(the_store)]


async def principal(request: Request) -> Principal:
    """Who asks, as the gate has found out. Raises ServiceError (401) where nobody does: on a page without a session."""
    who: Principal | None = request.state.principal
    if who is None:
        raise ServiceError("sign in with a key", 401, "missing_key")
    return who


@dataclass(frozen=True, slots=True)
class Required:
    """A dependency: the principal, who must have a scope. The document reads the scope off it."""

    scope: Scope

    async def __call__(self, who: Annotated[Principal, Depends(principal)]) -> Principal:
        who.require(self.scope)
        return who


def asker(scope: Scope) -> Any:
    """The principal, as a route's argument: `who: Annotated[Principal, asker(Scope.RUNS_READ)]`."""
    return Depends(Required(scope))


Reader = Annotated[Principal, asker(Scope.RUNS_READ)]
Writer = Annotated[Principal, asker(Scope.RUNS_WRITE)]
Admin = Annotated[Principal, asker(Scope.ADMIN)]
TeachersAdmin = Annotated[Principal, asker(Scope.TEACHERS_ADMIN)]


async def paging(
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=100)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> Page:
    return Page(limit=limit, after=after, ascending=order == "asc")


Paging = Annotated[Page, Depends(paging)]
IdempotencyKey = Annotated[str | None, Header(max_length=255)]


def once(who: Principal, key: str | None, route: str, body: Mapping[str, Any] | bytes) -> Once:
    """How a request is known when it comes again. `body`: as it was sent, or what identifies it."""
    content = body if isinstance(body, bytes) else json.dumps(body, sort_keys=True).encode()
    return Once(key_id=who.key_id, key=key, route=route, body_digest=hashlib.sha256(content).hexdigest())


async def auditing(request: Request, store: Stored) -> Callable[..., None]:
    """`audit(who, "run.cancel", run_id, …)`, under this request's id."""

    def record(who: Principal, action: str, object: str, **detail: Any) -> None:
        store.audit.record(who, action, object, request_id=request.state.request_id, **detail)

    return record


Auditing = Annotated[Callable[..., None], Depends(auditing)]


def listed(data: Iterable[Mapping[str, Any]], has_more: bool, key: str = "id") -> dict[str, Any]:
    """A page as the API shows it."""
    items = list(data)
    first, last = (items[0][key], items[-1][key]) if items else (None, None)
    return {"object": "list", "data": items, "has_more": has_more, "first_id": first, "last_id": last}


def created(resource: Mapping[str, Any], location: str, *, replayed: bool) -> JSONResponse:
    """201 and where it is; 200 when the same request had made it before."""
    headers = {"Location": location} | ({"Idempotent-Replayed": "true"} if replayed else {})
    return JSONResponse(dict(resource), status_code=200 if replayed else 201, headers=headers)
