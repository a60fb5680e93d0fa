"""What every route that scores does alike: take a place, read the body, work aside, wait for scores.

Whatever may take long happens on two threads of their own: while they decode, the event loop answers, and more threads
would only take the interpreter from it. It knows no message: what is read and what is answered are the routes'.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request

from potstill.types import ScoreStatus, TeacherIdentity, TeacherScores
from teacher_server.admission import Teacher
from teacher_server.batching import Job, QueueFull, Scored, ScoringQueue
from teacher_server.limits import Limits, Refusal
from teacher_server.metrics import Metrics
from teacher_server.places import Place, Places

_DISCONNECT_POLL_S = 0.25
_THREADS = 2
_JSON_TEXT = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"(\s*:)?|\Z)', re.DOTALL)  # a string; the group: it is a key

Given = ParamSpec("Given")
Made = TypeVar("Made")


class ScoringService:
    """One teacher, its queue and its limits. `close` ends the queue, all pending work done."""

    def __init__(self, teacher: Teacher, queue: ScoringQueue, limits: Limits) -> None:
        self.teacher = teacher
        self.queue = queue
        self.limits = limits
        self.places = Places(limits, lambda: queue.seconds_to_drain)
        self.metrics = Metrics(queue, self.places)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="aside")

    def close(self) -> None:
        self.queue.close()
        self._threads.shutdown()

    @contextmanager
    def visit(self) -> Iterator[Place]:
        """One request's stay. Raises Refusal at once when there is no room for it, before any of it is read."""
        if self.queue.tokens >= self.limits.queue_tokens:
            raise self._full()
        with self.places.place() as place:
            yield place

    async def aside(self, work: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made:
        """Do what takes long, where it delays no other request's small steps."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args, **kwargs))

    async def score(
        self, request: Request, jobs: Sequence[Job], *, deadline: float
    ) -> tuple[TeacherIdentity, list[TeacherScores]]:
        """Who scored, and the scores of all jobs: those not done by `deadline` (time.monotonic()'s) are cancelled.

        When the client leaves, all of them are. Raises Refusal when the queue is full, or nothing was scored in time.
        """
        started = time.monotonic()
        try:
            futures = self.queue.submit(jobs, deadline=deadline)
        except QueueFull:
            raise self._full() from None
        await _settle(request, futures, deadline)
        done = [None if not future.done() or future.cancelled() else (future.result(),) for future in futures]
        if (None,) in done and not self.queue.alive:
            raise Refusal(503, "not_ready", "the scoring thread is not running", retry_after_s=5)
        if not any(done):
            raise Refusal(504, "deadline_exceeded", "the deadline passed before anything was scored", retry_after_s=1)
        known = [one[0].identity for one in done if one and one[0]]
        identity = known[0] if known else self.teacher.identity
        scores = [_outcome(job, one, identity) for job, one in zip(jobs, done, strict=True)]
        self.metrics.tokens.inc(sum(len(one.sampled) for one in scores if one.status == ScoreStatus.OK))
        self.metrics.seconds.observe(time.monotonic() - started)
        return identity, scores

    def _full(self) -> Refusal:
        message = "the scoring queue is full; try again later"
        return Refusal(503, "overloaded", message, retry_after_s=self.queue.seconds_to_drain)


async def _settle(request: Request, futures: Sequence[Scored], deadline: float) -> None:
    """Wait until all are done or the deadline has passed; then cancel the rest. All of them when the client leaves."""
    waiting = {asyncio.wrap_future(future) for future in futures}
    try:
        while waiting and (left := deadline - time.monotonic()) > 0:
            _, waiting = await asyncio.wait(waiting, timeout=min(left, _DISCONNECT_POLL_S))
            if waiting and await request.is_disconnected():
                raise client_left()
    finally:
        for future in futures:
            future.cancel()


def _outcome(job: Job, done: tuple[TeacherScores | None] | None, identity: TeacherIdentity) -> TeacherScores:
    if done is None:
        return job.unscored(identity, ScoreStatus.DEADLINE)
    return done[0] or job.unscored(identity, ScoreStatus.FAILED)


# --------------------------------------------------------------------------------------------------------- bodies


def media_type(request: Request, *accepted: str) -> str:
    """The body's type, which must be one of `accepted`; raises Refusal, and for an encoded body too."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "unsupported_encoding", "send the body without content-encoding")
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in accepted:
        raise Refusal(415, "unsupported_media_type", f"send {' or '.join(accepted)}")
    return given


def check_json(body: bytes, limits: Limits) -> None:
    """Raise Refusal for a body with too many keys; all that it reads are quotes, backslashes and colons."""
    if sum(1 for text in _JSON_TEXT.finditer(body) if text[1]) > limits.max_json_keys:
        raise Refusal(413, "request_too_large", f"the body has more than {limits.max_json_keys} keys")


def announced_bytes(request: Request, limit: int) -> int | None:
    """What the client says that its body has; None when it does not say. Raises Refusal above `limit`."""
    announced = request.headers.get("content-length")
    if announced is None:
        return None
    if not (announced.isascii() and announced.isdecimal()):
        raise Refusal(400, "invalid_request", "is not a number of bytes", "content-length")
    if len(announced) > len(str(limit)) or int(announced) > limit:
        raise too_large(limit)
    return int(announced)


async def read_body(request: Request, place: Place, *, limit: int, max_read_s: float) -> bytes:
    """The body, never more than `limit` bytes of it: the announced length and what really comes are both checked."""
    announced = announced_bytes(request, limit)
    place.reserve(announced or 0)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(max_read_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large(limit)
                if announced is None:
                    place.reserve(len(chunk))
                chunks.append(chunk)
    except ClientDisconnect:
        raise client_left() from None
    except TimeoutError:
        raise Refusal(408, "request_timeout", f"the body did not arrive within {max_read_s:g} s", None, 1) from None
    return b"".join(chunks)


def too_large(limit: int) -> Refusal:
    return Refusal(413, "request_too_large", f"the body is larger than {limit} bytes")


def client_left() -> Refusal:
    """Seen by nobody but the metrics."""
    return Refusal(499, "client_closed_request", "the client left")
