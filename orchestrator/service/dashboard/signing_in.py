"""The door: a key is sent once and exchanged for a session, whose secret is in a cookie that no script can read.

The cookie is HttpOnly, SameSite=Strict, and Secure over https; it ends after a week, with its key, or by signing out.
Refuses an address after ten wrong keys within a minute, until the minute is over.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.service.authentication import COOKIE
from orchestrator.service.dashboard.viewing import page
from orchestrator.service.routes.asking import Auditing, State
from potstill.errors import ServiceError

SESSION_S = 7 * 24 * 3600.0
WRONG_KEYS, WITHIN_S = 10, 60.0
_ADDRESSES = 10_000  # that are remembered at most

router = APIRouter(include_in_schema=False)


class Attempts:
    """Wrong keys by the address that they came from."""

    def __init__(self) -> None:
        self._failed: dict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def check(self, address: str, now: float) -> None:
        """Raises ServiceError (429) when too many of them were wrong lately."""
        with self._lock:
            recent = self._failed.get(address, deque())
            while recent and recent[0] <= now - WITHIN_S:
                recent.popleft()
            if len(recent) >= WRONG_KEYS:
                raise ServiceError("too many wrong keys: wait a minute, then try again", 429, "too_many_attempts")

    def failed(self, address: str, now: float) -> None:
        with self._lock:
            if len(self._failed) >= _ADDRESSES:
                self._failed = defaultdict(deque, {a: f for a, f in self._failed.items() if f[-1] > now - WITHIN_S})
            self._failed[address].append(now)


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: Annotated[str, Field(max_length=200)]


@router.get("/login")
def login_page(request: Request, state: State, next: str = "/") -> Response:
    """Straight on for who is signed in already."""
    secret = request.cookies.get(COOKIE)
    if secret is not None and state.store.keys.session(secret) is not None:
        return RedirectResponse(local(next), status_code=303)
    return page(request, "login.html.j2", who=None, next=local(next))


@router.post("/login", status_code=204)
def login(body: Key, request: Request, state: State, audit: Auditing) -> Response:
    """Exchange a key for a session."""
    attempts: Attempts = request.app.state.attempts
    address = request.client.host if request.client else ""
    attempts.check(address, time.monotonic())
    who = state.store.keys.bearer(body.key.strip())
    if who is None:
        attempts.failed(address, time.monotonic())
        raise ServiceError("this key is not known, has expired or was revoked", 401, "invalid_key")
    secret = state.store.keys.open_session(who.key_id, SESSION_S)
    audit(who, "session.open", who.key_id)
    response = Response(status_code=204)
    response.set_cookie(
        COOKIE,
        secret,
        max_age=int(SESSION_S),
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


@router.post("/logout")
def logout(request: Request, state: State) -> JSONResponse:
    """End the session, here and in the store."""
    secret = request.cookies.get(COOKIE)
    if secret is not None:
        state.store.keys.close_session(secret)
    response = JSONResponse({"signed_out": True}, headers={"Clear-Site-Data": '"cache"'})
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return response


def local(address: str) -> str:
    """Where to go after signing in: a path of this site, or its first page."""
    plain = address.startswith("/") and not address.startswith(("//", "/\\")) and "\\" not in address
    return address if plain and address.isprintable() else "/"
