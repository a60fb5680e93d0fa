"""TeacherClient: asks a potstill teacher server for scores.

Every answer passes alignment.py before it is returned, so a caller gets right numbers, NaN with a status, or an error:

    TokenizerMismatch    the teacher reads the ids as other text
    TeacherRefused       another 4xx: the request is at fault, and is not sent again
    TeacherUnavailable   away, overloaded or too slow until the deadline
    AlignmentError       it answered, and the answer does not belong to the question

How a request is sent, and sent again, is outbound.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError

from potstill.alignment import aligned
from potstill.calling.outbound import Answer, Endpoint
from potstill.codec import SAFETENSORS, decode_response, encode_request
from potstill.errors import TeacherError, TeacherRefused, TokenizerMismatch
from potstill.types import TeacherIdentity, TeacherScores, WeightsVersion
from potstill.weights import as_safetensors
from potstill.wire import Ask, Capabilities, ScoreItem, ScoreRequest

_SMALL_ANSWER_BYTES = 2**20  # capabilities, errors, and the header of an answer
_CAPABILITIES = TypeAdapter(Capabilities)


class _Loaded(BaseModel):
    revision: str


_LOADED = TypeAdapter(_Loaded)


class TeacherClient:
    """One teacher server. Owns its endpoint; close it with `aclose`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._capabilities: Capabilities | None = None

    async def aclose(self) -> None:
        await self._endpoint.aclose()

    async def capabilities(self) -> Capabilities:
        """What the server can do. Asked once, then remembered."""
        if self._capabilities is None:
            answer = await self._endpoint.call("GET", "/v1/capabilities", limit_bytes=_SMALL_ANSWER_BYTES)
            if answer.status != 200:
                raise self._refusal(answer)
            try:
                self._capabilities = _CAPABILITIES.validate_json(answer.content)
            except ValidationError:
                raise TeacherRefused(f"{self._endpoint.url} is not a potstill teacher server of this version") from None
        return self._capabilities

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        """Scores of `items`, in their order; large batches are split under the server's limits.

        With `expect`, any other teacher is refused, before it scores.
        """
        if not items:
            return []
        deadline = asyncio.get_running_loop().time() + self._endpoint.policy.deadline_s
        able = await self.capabilities()
        requests = [
            ScoreRequest(
                model=able.model if expect is None else expect.name,
                items=tuple(part),
                ask=ask,
                expect_revision=None if expect is None else expect.revision,
                expect_tokenizer_fingerprint=None if expect is None else expect.tokenizer_fingerprint,
                deadline_ms=int(1000 * self._endpoint.policy.deadline_s) + 1,
            )
            for part in split(items, able)
        ]
        tasks = [asyncio.create_task(self._score(request, expect, deadline)) for request in requests]
        try:
            answers = await asyncio.gather(*tasks)
        finally:  # the first failure decides; what is still in flight is of no use
            for task in tasks:
                task.cancel()
        return [scores for answer in answers for scores in answer]

    async def push_weights(self, version: WeightsVersion, payload: NDArray[np.uint8], *, ema_decay: float) -> str:
        """Give a self-teacher new weights: d · its own + (1 - d) · these; 0 replaces them. Returns its new revision.

        Only a server that was started to take weights does; scores asked for earlier are still of the old ones. Raises
        TeacherRefused for a version that is not newer, or tensors that are not the model's.
        """
        self._capabilities = None  # also where the answer is lost, and nobody knows which revision it now is
        answer = await self._endpoint.call(
            "POST",
            f"/v1/weights?version={version.version}" + (f"&ema_decay={ema_decay}" if ema_decay else ""),
            body=as_safetensors(version, payload),
            content_type=SAFETENSORS,
            limit_bytes=_SMALL_ANSWER_BYTES,
        )
        if answer.status != 200:
            raise self._refusal(answer)
        return _LOADED.validate_json(answer.content).revision

    async def _score(
        self, request: ScoreRequest, expect: TeacherIdentity | None, deadline: float
    ) -> list[TeacherScores]:
        answer = await self._endpoint.call(
            "POST",
            "/v1/score",
            body=encode_request(request, SAFETENSORS),
            content_type=SAFETENSORS,
            accept=SAFETENSORS,
            limit_bytes=_answer_bytes(request),
            deadline=deadline,
        )
        if answer.status != 200:
            raise self._refusal(answer)
        return aligned(request, decode_response(answer.content, SAFETENSORS), expect)

    def _refusal(self, answer: Answer) -> TeacherError | TokenizerMismatch:
        problem = self._endpoint.problem(answer)
        if problem.code == "tokenizer_mismatch":
            return TokenizerMismatch(f"teacher {self._endpoint.url}: {problem}")
        return self._endpoint.refusal(answer)


def split(items: Sequence[ScoreItem], able: Capabilities) -> list[list[ScoreItem]]:
    """Cut a batch where a request would pass the server's limits of items, tokens or bytes. Order is kept."""
    parts: list[list[ScoreItem]] = []
    num_tokens = num_bytes = 0
    for item in items:
        tokens, size = _size(item)
        full = num_tokens + tokens > able.max_tokens or num_bytes + size > able.max_body_bytes
        if not parts or full or len(parts[-1]) == able.max_items:
            parts.append([])
            num_tokens = num_bytes = 0
        parts[-1].append(item)
        num_tokens += tokens
        num_bytes += size
    return parts


def _size(item: ScoreItem) -> tuple[int, int]:
    """Upper bounds of the tokens that the teacher reads for an item, and of its bytes in a request."""
    text = sum(
        len(message.role.encode()) + len(message.content.encode()) + 64 for message in item.teacher_messages or ()
    )
    own = text if item.teacher_context_ids is None else len(item.teacher_context_ids)
    given = sum(
        ids.nbytes
        for ids in (item.context_ids, item.completion_ids, item.teacher_context_ids, item.token_ids)
        if ids is not None
    )
    return (own or len(item.context_ids)) + len(item.completion_ids), given + 6 * text + 1024


def _answer_bytes(request: ScoreRequest) -> int:
    """The most that an answer to `request` may take."""
    ask = request.ask
    per_token = 16 + 8 * (ask.top_k + ask.draws) + 4 * ask.num_ids + 2 * ask.hidden
    tokens = sum(len(item.completion_ids) for item in request.items)
    return _SMALL_ANSWER_BYTES + tokens * per_token + sum(6 * len(item.id) + 64 for item in request.items)
