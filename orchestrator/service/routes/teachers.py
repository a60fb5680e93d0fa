"""Registered teachers: administrators register, change, probe and remove them; who reads runs may see and name them.

Where a teacher is, and how its key is called, is shown to administrators of teachers alone; the key itself to nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.service.principals import Principal, Scope
from orchestrator.service.registry import Registry
from orchestrator.service.routes.asking import (
    Auditing,
    IdempotencyKey,
    Paging,
    Reader,
    State,
    TeachersAdmin,
    created,
    listed,
    once,
)
from orchestrator.service.routes.runs import revision_in
from orchestrator.service.runs import rfc3339
from orchestrator.service.scorers import tokenizer_of
from orchestrator.service.store.teachers import Teacher
from potstill.config_teachers import OpenAITeacher, RemoteWriter, ServerTeacher
from potstill.errors import ConfigError, ServiceError
from potstill.journal import finite
from potstill.probing.asking import FoundScorer, FoundWriter, of_table

router = APIRouter(prefix="/v1/teachers", tags=["teachers"])

_SHOWN = ("kind", "model", "revision", "context_length", "tokenizer", "price_in", "price_out", "budget", "ranks")


class Registration(BaseModel):
    """A teacher, under a name by which runs borrow it."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    teacher: dict[str, Any]
    """A [teacher] table of a kind that is called: server, vllm, completions or openai."""


class Change(BaseModel):
    model_config = ConfigDict(extra="forbid")
    teacher: dict[str, Any]
    """All of the table that takes the place of the one there is."""


class Probe(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tokenizer: Annotated[str, Field(max_length=600)] | None = None
    """A model with the teacher's tokenizer, where neither the teacher nor its table tells its tokens."""


@router.post("", status_code=201, operation_id="register_teacher")
def register_teacher(
    body: Registration, who: TeachersAdmin, state: State, audit: Auditing, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Register a teacher. Its key is named (`file:NAME`, `env:POTSTILL_SECRET_NAME`), never written."""
    table = state.catalog.registry.checked(body.teacher)
    request = once(who, idempotency_key, "/v1/teachers", body.model_dump(mode="json"))
    teacher, replayed = state.store.teachers.add(body.name, table, request)
    if not replayed:
        audit(who, "teacher.register", teacher.id)
    answer = created(_resource(teacher, who), f"/v1/teachers/{teacher.id}", replayed=replayed)
    answer.headers["ETag"] = _etag(teacher)
    return answer


@router.get("", operation_id="list_teachers")
def list_teachers(who: Reader, state: State, page: Paging) -> dict[str, Any]:
    """A page of teachers, newest first."""
    teachers, more = state.store.teachers.page(page)
    return listed([_resource(teacher, who) for teacher in teachers], more)


@router.get("/{teacher_id}", operation_id="get_teacher")
def get_teacher(teacher_id: str, who: Reader, state: State) -> JSONResponse:
    """One teacher, with what its last probe found. Its ETag is what PATCH asks for."""
    return _answer(state.catalog.registry.get(teacher_id), who)


@router.patch("/{teacher_id}", operation_id="update_teacher")
def update_teacher(
    teacher_id: str,
    body: Change,
    who: TeachersAdmin,
    state: State,
    audit: Auditing,
    if_match: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Put another table in its place. What a probe found of the old one is forgotten; runs that have it keep it."""
    state.catalog.registry.get(teacher_id)
    revision = revision_in(if_match)
    teacher = state.store.teachers.change(teacher_id, state.catalog.registry.checked(body.teacher), revision=revision)
    audit(who, "teacher.update", teacher_id)
    return _answer(teacher, who)


@router.delete("/{teacher_id}", status_code=204, operation_id="delete_teacher")
def delete_teacher(teacher_id: str, who: TeachersAdmin, state: State, audit: Auditing) -> Response:
    """Forget a teacher. 409 while a run names it that is not at its end."""
    state.catalog.registry.get(teacher_id)
    state.store.teachers.delete(teacher_id)
    audit(who, "teacher.delete", teacher_id)
    return Response(status_code=204)


@router.post("/{teacher_id}/probe", operation_id="probe_teacher")
def probe_teacher(
    teacher_id: str, who: TeachersAdmin, state: State, audit: Auditing, body: Probe | None = None
) -> JSONResponse:
    """Ask it what it really offers: some thirty tiny requests; of kind openai two short answers, which cost a little.

    What is found is kept and shown with the teacher. 502 when it is away or no teacher answers there, 504 when it is
    too slow.
    """
    registry = state.catalog.registry
    teacher = registry.get(teacher_id)
    found = _probed(registry, teacher, None if body is None else body.tokenizer)
    audit(who, "teacher.probe", teacher_id, usable=found.usable)
    kept = {"usable": found.usable, **finite(found.as_dict())}
    if isinstance(found, FoundScorer) and found.report.able is None:
        raise ServiceError("no teacher of this kind answers there, or it is away", 502, "teacher_unreachable")
    return _answer(state.store.teachers.probed(teacher_id, kept, revision=teacher.revision), who)


def _probed(registry: Registry, teacher: Teacher, tokenizer: str | None) -> FoundScorer | FoundWriter:
    """Raises ServiceError (504) when it takes too long."""
    table, access = registry.called(teacher)
    needs_tokens = not isinstance(table, ServerTeacher | RemoteWriter)
    own = None if isinstance(table, OpenAITeacher) else table.tokenizer
    folder = tokenizer_of(registry, own, tokenizer) if needs_tokens or tokenizer is not None else None
    work = of_table(table, access, tokenizer=folder, guard=registry.guard)
    try:
        return asyncio.run(asyncio.wait_for(work, registry.probe_s))
    except TimeoutError:
        raise ServiceError(f"the probe took longer than {registry.probe_s:g} s", 504, "probe_timeout") from None
    except ConfigError:  # which tells where it is, or where its tokenizer lies
        message = "the teacher cannot be called, or its tokenizer not be read: register it anew"
        raise ServiceError(message, 503, "teacher_not_called") from None


def _answer(teacher: Teacher, who: Principal) -> JSONResponse:
    return JSONResponse(_resource(teacher, who), headers={"ETag": _etag(teacher)})


def _etag(teacher: Teacher) -> str:
    return f'"r{teacher.revision}"'


def _resource(teacher: Teacher, who: Principal) -> dict[str, Any]:
    is_theirs = who.may(Scope.TEACHERS_ADMIN)
    table = teacher.config
    return {
        "id": teacher.id,
        "object": "teacher",
        "created_at": rfc3339(teacher.created_at),
        "created_by": teacher.key_id,
        "teacher": dict(table) if is_theirs else {name: table[name] for name in _SHOWN if name in table},
        "probe": _probe_resource(teacher.probe, is_theirs=is_theirs),
        "probed_at": rfc3339(teacher.probed_at),
    }


def _probe_resource(found: Mapping[str, Any] | None, *, is_theirs: bool) -> dict[str, Any] | None:
    """What was found. Sentences about problems may say where the teacher is."""
    if found is None or is_theirs:
        return None if found is None else dict(found)
    return {name: value for name, value in found.items() if name not in {"url", "problems", "notes"}}
