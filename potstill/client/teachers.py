"""The calls about registered teachers, and scores from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.client.answers import as_nothing, as_object, path, read
from potstill.client.resources import Page, Teacher
from potstill.client.runs import idempotency
from potstill.client.steps import Ask, Call, Program, Reply

PROBE_S = 120.0
SCORE_S = 300.0


def register_teacher(name: str, teacher: Mapping[str, Any], *, idempotency_key: str | None = None) -> Call[Teacher]:
    """Register a teacher under a name. `teacher` is a [teacher] table; its secret is a reference, never the key."""
    body = {"name": name, "teacher": dict(teacher)}
    return Call(method="POST", path="/v1/teachers", body=body, headers=idempotency(idempotency_key), reads=as_object)


def list_teachers(*, limit: int = 20, after: str | None = None) -> Call[Page[Teacher]]:
    """A page of teachers, newest first."""
    return Call(method="GET", path="/v1/teachers", params={"limit": limit, "after": after}, reads=as_object)


def get_teacher(name: str) -> Call[Teacher]:
    """A teacher, and what its last probe has found."""
    return Call(method="GET", path=path("v1", "teachers", name), reads=as_object)


def update_teacher(name: str, teacher: Mapping[str, Any]) -> Program[Teacher]:
    """Put another [teacher] table in its place; what was found of the old one is forgotten."""
    seen: Reply = yield Ask(get_teacher(name))
    read(get_teacher(name), seen)
    change: Call[Teacher] = Call(
        method="PATCH",
        path=path("v1", "teachers", name),
        body={"teacher": dict(teacher)},
        headers={"If-Match": seen.headers.get("etag", "")},
        reads=as_object,
        repeatable=False,
    )
    answer: Reply = yield Ask(change)
    return read(change, answer)


def delete_teacher(name: str) -> Call[None]:
    """Remove a teacher. Refused while a run that is not at its end names it."""
    return Call(method="DELETE", path=path("v1", "teachers", name), reads=as_nothing)


def probe_teacher(name: str, *, tokenizer: str | None = None) -> Call[Teacher]:
    """Ask a teacher what it really offers. One that only writes is paid for two short answers.

    `tokenizer`: a model of the service's with the teacher's tokenizer, where it is not one of potstill's own servers.
    """
    return Call(
        method="POST",
        path=path("v1", "teachers", name, "probe"),
        body={} if tokenizer is None else {"tokenizer": tokenizer},
        reads=as_object,
        repeatable=False,
        timeout_s=PROBE_S,
    )


def score(teacher: str, request: Mapping[str, Any]) -> Call[dict[str, Any]]:
    """Have a registered teacher score text. `request`: a body of POST /v1/score, without the teacher's name."""
    return Call(
        method="POST", path="/v1/score", body={**request, "teacher": teacher}, reads=as_object, timeout_s=SCORE_S
    )
