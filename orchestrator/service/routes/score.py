"""POST /v1/score: log-probs of given text from a registered teacher, in the teacher server's own JSON.

The same layer asks as in a run (potstill/teachers, potstill/calling): its deadlines, its checks of every answer. When
the client leaves, the question is taken back. What a teacher says of a question it refuses is not passed on.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError

from orchestrator.service.gate import JSON, JsonObject
from orchestrator.service.principals import Principal, Scope
from orchestrator.service.routes.asking import State, asker
from orchestrator.service.scorers import Scorers
from orchestrator.service.store.teachers import Teacher
from potstill.codec import decode_request, encode_response
from potstill.errors import (
    AlignmentError,
    ServiceError,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
    TokenizerMismatch,
)
from potstill.teachers.scorer import Scorer
from potstill.types import TeacherIdentity
from potstill.wire import ScoreRequest, ScoreResponse, WireError

router = APIRouter(prefix="/v1", tags=["score"])
Asker = Annotated[Principal, asker(Scope.SCORES_WRITE)]

MOST_NUMBERS = 262_144  # of an answer: JSON is written in one go
LONGEST_S = 120.0
_LOOK_S = 0.25  # between two looks whether the client is still there


@router.post(
    "/score",
    operation_id="score_text",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                JSON: {
                    "schema": {
                        "type": "object",
                        "required": ["teacher", "items"],
                        "properties": {"teacher": {"type": "string"}, "items": {"type": "array"}},
                    }
                }
            },
        }
    },
)
async def score(request: Request, who: Asker, state: State, body: JsonObject) -> Response:
    """Have a registered teacher score completions: `teacher`, and the fields of the teacher server's `/v1/score`.

    `tokenizer` names a model with the teacher's tokenizer, where the teacher is not one of potstill's own servers.
    """
    question = await asyncio.to_thread(_Question, body)
    teacher: Teacher = await asyncio.to_thread(state.catalog.registry.get, question.teacher)
    scorers: Scorers = state.catalog.scorers
    async with scorers.of(teacher, question.tokenizer) as scorer:
        answer = await _unless_the_client_leaves(request, _answer(scorer, question, request.state.request_id))
    return Response(await asyncio.to_thread(encode_response, answer, JSON), media_type=JSON)


class _Question:
    """A request, read and checked. Raises RequestValidationError, ServiceError."""

    def __init__(self, body: dict[str, Any]) -> None:
        fields = dict(body)
        self.teacher = _name(fields, "teacher") or ""
        self.tokenizer = _name(fields, "tokenizer")
        self.model = _name(fields, "model")  # that the teacher must have, if the client says so
        try:
            self.asked: ScoreRequest = decode_request(json.dumps({**fields, "model": self.model or ""}).encode(), JSON)
        except WireError as error:
            raise _invalid(re.findall(r"\w+", error.param), str(error.args[0])) from None
        if self.asked.seed:
            raise _invalid(["seed"], "must be 0: draws are the same for the same request")
        ask = self.asked.ask
        each = 2 + 2 * (ask.top_k + ask.draws) + ask.num_ids + ask.hidden
        numbers = each * sum(len(item.completion_ids) for item in self.asked.items)
        if numbers > MOST_NUMBERS:
            message = f"the answer would have {numbers} numbers, and may have {MOST_NUMBERS}: ask for less at a time"
            raise ServiceError(message, 413, "answer_too_large")

    @property
    def deadline_s(self) -> float:
        return min(LONGEST_S, (self.asked.deadline_ms or 1000 * LONGEST_S) / 1000)


def _name(fields: dict[str, Any], field: str) -> str | None:
    value = fields.pop(field, None)
    if not isinstance(value, str | None) or (field == "teacher" and value is None):
        raise _invalid([field], "must be a name")
    return value


def _invalid(where: list[str], message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", *where), "msg": message, "type": "value_error"}])


async def _answer(scorer: Scorer, question: _Question, request_id: str) -> ScoreResponse:
    """Raises ServiceError for whatever the teacher does not do."""
    try:
        async with asyncio.timeout(question.deadline_s):
            identity = (await scorer.capabilities()).identity
            is_told = _check_expected(question, identity)
            asked = question.asked
            scores = await scorer.score(asked.items, asked.ask, identity if is_told else None)
    except TokenizerMismatch:
        raise ServiceError("the teacher reads these ids as other text", 422, "tokenizer_mismatch") from None
    except TeacherRefused:
        message = "the teacher refused the request: compare it with what a probe of the teacher found"
        raise ServiceError(message, 400, "teacher_refused") from None
    except TeacherUnavailable:
        raise ServiceError("the teacher is away or busy: try again later", 503, "teacher_unavailable") from None
    except AlignmentError:
        raise ServiceError("the teacher's answer does not belong to the question", 502, "teacher_answer") from None
    except TeacherError:
        raise ServiceError("the teacher is at an address that is not called", 502, "teacher_not_called") from None
    except TimeoutError:
        raise ServiceError("the teacher gave no answer before the deadline", 504, "deadline_exceeded") from None
    ids = tuple(item.id for item in asked.items)
    return ScoreResponse(request_id=request_id, identity=scores[0].identity, ids=ids, scores=tuple(scores))


def _check_expected(question: _Question, found: TeacherIdentity) -> bool:
    """Whether the client said whom it expects. Raises ServiceError when this is somebody else."""
    asked = question.asked
    if asked.expect_tokenizer_fingerprint not in {None, found.tokenizer_fingerprint}:
        raise ServiceError("the teacher reads these ids as other text", 422, "tokenizer_mismatch")
    if asked.expect_revision not in {None, found.revision} or question.model not in {None, found.name}:
        raise ServiceError("the teacher is another model or revision than expected", 412, "revision_changed")
    return (asked.expect_tokenizer_fingerprint, asked.expect_revision, question.model) != (None, None, None)


async def _unless_the_client_leaves(request: Request, work: Coroutine[Any, Any, ScoreResponse]) -> ScoreResponse:
    """What the work makes. It is cancelled when the client is gone, and whatever ends this."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_S)
            if not task.done() and await request.is_disconnected():
                raise ServiceError("the client left", 499, "client_left")
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
