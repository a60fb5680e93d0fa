"""From a reply to what it means: a JSON object, a list, a text, bytes, or the refusal that it is.

Refuses an answer that is not the service's: a proxy's page is no run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from potstill.client.steps import Ask, Call, Program, Reply
from potstill.errors import ConfigError, ServiceError

R = TypeVar("R")

JSON = "application/json"


class Refused(ServiceError):
    """The service's own words. args: message, HTTP status, code, request id, details."""

    def __init__(
        self,
        message: str,
        status: int | None,
        code: str | None,
        request_id: str | None = None,
        details: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(message, status, code, request_id, details)

    @property
    def request_id(self) -> str | None:
        """Leads to a line of the service's log."""
        found: str | None = self.args[3]
        return found

    @property
    def details(self) -> Sequence[dict[str, Any]]:
        """One for each mistake, where there are several: {"loc": a JSON pointer or None, "message": …}."""
        found: Sequence[dict[str, Any]] = self.args[4]
        return found


def ask(call: Call[R]) -> Program[R]:
    """One call as a program. Raises Refused for an answer that is no success."""
    reply: Reply = yield Ask(call)
    return read(call, reply)


def read(call: Call[R], reply: Reply) -> R:
    """What the answer says. Raises Refused for one that is no success."""
    if not reply.good:
        raise refusal(reply)
    return call.reads(reply)


def refusal(reply: Reply) -> Refused:
    """The service's reason, or the bare status of whoever answered in its place."""
    request_id = reply.headers.get("x-request-id")
    try:
        error = json.loads(reply.content)["error"]
        details = error.get("details") or ()
        return Refused(str(error["message"]), reply.status, str(error["code"]), request_id, tuple(details))
    except (ValueError, KeyError, TypeError, AttributeError):
        message = f"HTTP {reply.status}, and not in a potstill service's words: check the URL"
        return Refused(message, reply.status, None, request_id)


def as_object(reply: Reply) -> Any:
    """A JSON object. What it holds is the service's promise: fields that this client does not know stay in it."""
    kind = reply.headers.get("content-type", "").partition(";")[0].strip()
    if kind == JSON:
        try:
            value: Any = json.loads(reply.content)
        except ValueError:
            value = None
        if isinstance(value, dict):
            return value
    raise ServiceError("the answer is not one of a potstill service: check the URL", reply.status, "foreign_answer")


def as_text(reply: Reply) -> str:
    return reply.content.decode("utf-8", "replace")


def as_bytes(reply: Reply) -> bytes:
    return reply.content


def as_nothing(_reply: Reply) -> None:
    return None


def path(*parts: str) -> str:
    """A path from its parts, none of which can leave its place: /v1/runs/a%2Fb. Raises ConfigError for no name."""
    for part in parts:
        if not part.strip("."):
            raise ConfigError(f"{part!r} names nothing: an id is needed")
    return "/" + "/".join(quote(part, safe="") for part in parts)
