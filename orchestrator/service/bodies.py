"""JSON bodies: read to a limit, checked once, and handed on both as they were sent and as the value that they are.

Refuses what is too large while it is being read, and what is no JSON object: NaN, lone surrogates, nesting without end.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Message, Receive

from potstill.errors import ServiceError

MAX_BODY_BYTES = 4 << 20
MOST_MEMBERS = 50_000  # a report of 200 steps with 100 numbers each has 20,000
_AT_ONCE = 64 << 10  # parsed between two other requests; more is parsed in a thread


async def read_json(receive: Receive, length: str | None) -> tuple[dict[str, Any], Receive]:
    """The value, an empty body being an empty one, and a `receive` that gives the body again.

    `length` is the request's Content-Length. Raises ServiceError: 413, or 400 invalid_json.
    """
    if length is not None and length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ServiceError("the connection ended before the body did", 400, "invalid_json")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    content = bytes(body)
    value = _parsed(content) if len(content) <= _AT_ONCE else await asyncio.to_thread(_parsed, content)
    return value, _again(content, receive)


def _too_large() -> ServiceError:
    return ServiceError(f"the body is larger than {MAX_BODY_BYTES} bytes", 413, "body_too_large")


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content or b"{}", parse_constant=_no_constant, object_pairs_hook=_Members())
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are JSON, but no text
    except (ValueError, RecursionError):  # ValueError: bad JSON, bad UTF-8, NaN, a surrogate, an endless number
        raise ServiceError("the body is not a JSON value in UTF-8", 400, "invalid_json") from None
    if not isinstance(value, dict):
        raise ServiceError("the body must be a JSON object", 400, "invalid_json")
    return value


class _Members:
    """Makes objects of their members, and counts these: what checks them takes its time for each."""

    def __init__(self) -> None:
        self._left = MOST_MEMBERS

    def __call__(self, members: list[tuple[str, Any]]) -> dict[str, Any]:
        self._left -= len(members)
        if self._left < 0:
            raise ServiceError(f"the body's objects have more than {MOST_MEMBERS} members", 413, "body_too_large")
        return dict(members)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _again(content: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replay
