"""The teacher's HTTP face. Routes only: what is refused is in limits.py and admission.py, the work is in engine.py.

    POST /v1/score   GET /v1/models   GET /v1/capabilities      with a bearer key
    GET /livez   GET /readyz   GET /metrics                     without

One error shape for every path, an X-Request-Id on every answer. Prompts, contexts and keys are never logged or echoed.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from potstill.codec import JSON, SAFETENSORS, decode_request, encode_response
from potstill.types import ScoreStatus, TeacherScores
from potstill.wire import ScoreRequest, ScoreResponse, WireError
from teacher_server.admission import Teacher, admit, capabilities
from teacher_server.batching import Job, QueueFull, ScoringQueue
from teacher_server.limits import Limits, Refusal

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DISCONNECT_POLL_S = 0.25


class Metrics:
    """The server's numbers, in a registry of their own."""

    def __init__(self, queue: ScoringQueue) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("teacher_requests", "Answers by status.", ["status"], registry=self.registry)
        self.tokens = Counter("teacher_scored_tokens", "Completion tokens scored.", registry=self.registry)
        self.seconds = Histogram("teacher_score_seconds", "Wall time of POST /v1/score.", registry=self.registry)
        waiting = Gauge("teacher_queue_tokens", "Tokens waiting or being scored.", registry=self.registry)
        waiting.set_function(lambda: queue.tokens)


def create_app(teacher: Teacher, queue: ScoringQueue, limits: Limits, key: str) -> ASGIApp:
    """The application. It owns `queue` and closes it, all pending work done, when the server stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(queue.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(queue)
    _answer_errors_in_one_shape(app)
    app.include_router(_teaching(teacher, queue, limits, metrics), dependencies=[Depends(_bearer(key))])
    app.include_router(_watching(queue, metrics))
    return NamedRequests(app, metrics)


def _teaching(teacher: Teacher, queue: ScoringQueue, limits: Limits, metrics: Metrics) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, object]:
        model = {"id": teacher.identity.name, "object": "model", "created": 0, "owned_by": "potstill"}
        return {"object": "list", "data": [model]}

    @router.get("/capabilities")
    async def what_i_can() -> dict[str, object]:
        return capabilities(teacher, limits).model_dump()

    @router.post("/score")
    async def score(request: Request) -> Response:
        started = time.monotonic()
        answer_type = _answer_type(request)
        body = await _read_body(request, limits.max_body_bytes)
        asked, jobs = await run_in_threadpool(_understand, body, request, teacher, limits)
        deadline_s = min(limits.max_deadline_s, (asked.deadline_ms or 1000 * limits.max_deadline_s) / 1000)
        try:
            futures = queue.submit(jobs)
        except QueueFull as full:
            message = "the scoring queue is full; try again later"
            raise Refusal(503, "overloaded", message, retry_after_s=full.retry_after_s) from None
        scores = await _collect(request, jobs, futures, teacher, deadline=started + deadline_s)
        metrics.tokens.inc(sum(len(item.sampled) for item in scores if item.status == ScoreStatus.OK))
        metrics.seconds.observe(time.monotonic() - started)
        answer = ScoreResponse(
            request_id=request.state.request_id,
            identity=teacher.identity,
            ids=tuple(item.id for item in asked.items),
            scores=tuple(scores),
        )
        return Response(await run_in_threadpool(encode_response, answer, answer_type), media_type=answer_type)

    return router


def _watching(queue: ScoringQueue, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/livez")
    @router.get("/readyz")
    async def alive() -> dict[str, str]:
        """Both are one question here: the model is loaded before the server listens, and only its thread can die."""
        if not queue.alive:
            raise Refusal(503, "not_ready", "the scoring thread is not running", retry_after_s=5)
        return {"status": "ok"}

    @router.get("/metrics")
    async def numbers() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


# ------------------------------------------------------------------------------------------- one request, in order


def _bearer(key: str) -> Callable[[Request], Awaitable[None]]:
    expected = f"Bearer {key}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, expected):
            raise Refusal(401, "invalid_api_key", "send the key this server was started with: Authorization: Bearer …")

    return check


def _answer_type(request: Request) -> str:
    """Safetensors for those who ask for it; JSON for everybody else."""
    return SAFETENSORS if SAFETENSORS in request.headers.get("accept", "") else JSON


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, never more than `limit` bytes of it: the announced length and what really comes are both checked."""
    too_large = Refusal(413, "request_too_large", f"the body is larger than {limit} bytes")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "unsupported_encoding", "send the body without content-encoding")
    announced = request.headers.get("content-length")
    if announced is not None and int(announced) > limit:
        raise too_large
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise _client_left() from None
    return b"".join(chunks)


def _client_left() -> Refusal:
    """Seen by nobody but the metrics."""
    return Refusal(499, "client_closed_request", "the client left")


def _understand(body: bytes, request: Request, teacher: Teacher, limits: Limits) -> tuple[ScoreRequest, list[Job]]:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if media_type not in {JSON, SAFETENSORS}:
        raise Refusal(415, "unsupported_media_type", f"send {JSON} or {SAFETENSORS}")
    try:
        asked = decode_request(body, media_type)
    except WireError as error:
        raise Refusal(400, "invalid_request", str(error), error.param) from None
    return asked, admit(asked, teacher, limits)


async def _collect(
    request: Request,
    jobs: list[Job],
    futures: list[Future[TeacherScores | None]],
    teacher: Teacher,
    *,
    deadline: float,
) -> list[TeacherScores]:
    """Scores of all jobs; those not done by `deadline` are cancelled. When the client leaves, all of them are."""
    waiting = {asyncio.wrap_future(future) for future in futures}
    try:
        while waiting and (left := deadline - time.monotonic()) > 0:
            _, waiting = await asyncio.wait(waiting, timeout=min(left, _DISCONNECT_POLL_S))
            if waiting and await request.is_disconnected():
                raise _client_left()
    finally:
        for future in futures:
            future.cancel()
    if not any(future.done() and not future.cancelled() for future in futures):
        raise Refusal(504, "deadline_exceeded", "the deadline passed before anything was scored", retry_after_s=1)
    return [_outcome(job, future, teacher) for job, future in zip(jobs, futures, strict=True)]


def _outcome(job: Job, future: Future[TeacherScores | None], teacher: Teacher) -> TeacherScores:
    if future.cancelled() or not future.done():
        return job.unscored(teacher.identity, ScoreStatus.DEADLINE)
    return future.result() or job.unscored(teacher.identity, ScoreStatus.FAILED)


# ----------------------------------------------------------------------------------------------- around every request


class NamedRequests:
    """Gives every request its id, and counts every answer.

    It stands outside the application, so that even a crash has an id; and it is plain ASGI, because behind FastAPI's
    own middleware decorator a route cannot see that its client has left.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._metrics.requests.labels(status=str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, send_named)


def _answer_errors_in_one_shape(app: FastAPI) -> None:
    def answer(request: Request, refusal: Refusal) -> JSONResponse:
        headers = {} if refusal.retry_after_s is None else {"retry-after": str(refusal.retry_after_s)}
        return JSONResponse(refusal.envelope(request.state.request_id), refusal.status, headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, Refusal(error.status_code, "no_such_route", f"{error.detail}"))

    @app.exception_handler(Exception)
    async def crashed(request: Request, error: Exception) -> JSONResponse:
        log.error("request.crashed", request_id=request.state.request_id, exc_info=error)
        return answer(request, Refusal(500, "internal_error", "the teacher server failed; its log says why"))
