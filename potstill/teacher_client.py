"""TeacherClient: asks a teacher server for scores, and is the only layer that retries.

Every answer passes alignment.py before it is returned, so a caller gets right numbers, NaN with a status, or an error:

    TokenizerMismatch    the teacher reads the ids as other text
    TeacherRefused       another 4xx: the request is at fault, and is not sent again
    TeacherUnavailable   away, overloaded or too slow until the deadline
    AlignmentError       it answered, and the answer does not belong to the question

It follows no redirects, reads no proxy settings from the environment, and reads no answer larger than it must be.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx2
from pydantic import BaseModel, TypeAdapter, ValidationError

from potstill.alignment import aligned
from potstill.codec import SAFETENSORS, decode_response, encode_request
from potstill.errors import AlignmentError, TeacherError, TeacherRefused, TeacherUnavailable, TokenizerMismatch
from potstill.types import TeacherIdentity, TeacherScores
from potstill.wire import Capabilities, ScoreItem, ScoreRequest, Want

_RETRIED = {429, 502, 503}
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 10.0
_CONNECT_S = 5.0
_SMALL_ANSWER_BYTES = 2**20  # capabilities, errors, and the header of an answer


class _Problem(BaseModel):
    message: str = "no reason given"
    code: str | None = None
    param: str | None = None


class _Envelope(BaseModel):
    error: _Problem


_ENVELOPE = TypeAdapter(_Envelope)
_CAPABILITIES = TypeAdapter(Capabilities)


class TeacherClient:
    """One teacher server. Lives in one event loop; close it with `aclose` or `async with`.

    `deadline_s` is the total time of one call, retries included; `concurrency` bounds the requests in flight.
    """

    def __init__(self, url: str, key: str, deadline_s: float, concurrency: int) -> None:
        self._url = url
        self._deadline_s = deadline_s
        self._slots = asyncio.Semaphore(concurrency)
        self._dice = random.Random()
        self._capabilities: Capabilities | None = None
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {key}", "accept-encoding": "identity"},
            timeout=httpx2.Timeout(deadline_s, connect=_CONNECT_S),
            follow_redirects=False,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def capabilities(self) -> Capabilities:
        """What the server can do. Asked once, then remembered."""
        if self._capabilities is None:
            deadline = asyncio.get_running_loop().time() + self._deadline_s
            body = await self._send("GET", "/v1/capabilities", deadline, limit=_SMALL_ANSWER_BYTES)
            try:
                self._capabilities = _CAPABILITIES.validate_json(body)
            except ValidationError:
                raise TeacherRefused(f"{self._url} is not a potstill teacher server of this version") from None
        return self._capabilities

    async def score(
        self, items: Sequence[ScoreItem], want: frozenset[Want], top_k: int, expect: TeacherIdentity | None
    ) -> list[TeacherScores]:
        """Scores of `items`, in their order; large batches are split under the server's limits.

        `want` and `top_k` are those of ScoreRequest. With `expect`, any other teacher is refused, before it scores.
        """
        if not items:
            return []
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        able = await self.capabilities()
        requests = [
            ScoreRequest(
                model=able.model if expect is None else expect.name,
                items=tuple(part),
                want=want,
                top_k=top_k,
                expect_revision=None if expect is None else expect.revision,
                expect_tokenizer_fingerprint=None if expect is None else expect.tokenizer_fingerprint,
                deadline_ms=int(1000 * self._deadline_s) + 1,
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

    async def _score(
        self, request: ScoreRequest, expect: TeacherIdentity | None, deadline: float
    ) -> list[TeacherScores]:
        body = encode_request(request, SAFETENSORS)
        async with self._slots:
            answer = await self._send("POST", "/v1/score", deadline, limit=_answer_bytes(request), body=body)
        return aligned(request, decode_response(answer, SAFETENSORS), expect)

    async def _send(self, method: str, path: str, deadline: float, *, limit: int, body: bytes | None = None) -> bytes:
        """The body of a 200. Sends again, within the deadline, what a busy or absent server did not answer."""
        clock = asyncio.get_running_loop()
        attempt, reason = 0, "it did not answer in time"
        while True:
            retry_after_s = 0.0
            try:
                async with asyncio.timeout_at(deadline):
                    status, headers, content = await self._exchange(method, path, limit, body)
            except TimeoutError:
                raise TeacherUnavailable(self._gave_up(reason, attempt)) from None
            except httpx2.TransportError as error:
                reason = f"the connection failed ({type(error).__name__})"
            else:
                if status == 200:
                    return content
                problem = _problem(content)
                if status not in _RETRIED:
                    raise self._refusal(status, problem)
                reason = f"it answered {status}: {problem.message}"
                retry_after_s = _seconds(headers.get("retry-after"))
            attempt += 1
            pause_s = retry_after_s + self._dice.uniform(0, min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2**attempt))
            if clock.time() + pause_s >= deadline:
                raise TeacherUnavailable(self._gave_up(reason, attempt))
            await asyncio.sleep(pause_s)

    async def _exchange(
        self, method: str, path: str, limit: int, body: bytes | None
    ) -> tuple[int, httpx2.Headers, bytes]:
        """One request. Raises AlignmentError as soon as the answer is longer than `limit` bytes."""
        headers = {} if body is None else {"content-type": SAFETENSORS, "accept": SAFETENSORS}
        async with self._http.stream(method, path, content=body, headers=headers) as response:
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > limit:
                    raise AlignmentError(f"the teacher's answer to {path} is longer than the {limit} bytes it may have")
            return response.status_code, response.headers, bytes(content)

    def _gave_up(self, reason: str, attempts: int) -> str:
        return f"teacher {self._url} gave no answer within {self._deadline_s:g} s ({attempts} attempts): {reason}"

    def _refusal(self, status: int, problem: _Problem) -> TeacherError | TokenizerMismatch:
        what = f"{problem.message} ({problem.param})" if problem.param else problem.message
        if problem.code == "tokenizer_mismatch":
            return TokenizerMismatch(f"teacher {self._url}: {what}")
        kind = TeacherUnavailable if status >= 500 else TeacherRefused
        return kind(f"teacher {self._url} answered {status}: {what}")


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
    total = _SMALL_ANSWER_BYTES
    for item in request.items:
        num_ids = 0 if item.token_ids is None else item.token_ids.shape[1]
        total += len(item.completion_ids) * (16 + 8 * request.top_k + 4 * num_ids) + 6 * len(item.id) + 64
    return total


def _problem(content: bytes) -> _Problem:
    try:
        return _ENVELOPE.validate_json(content).error
    except ValidationError:
        return _Problem()


def _seconds(retry_after: str | None) -> float:
    """Retry-After in seconds; its other form, a date, is not used between our own services."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
