"""The teacher's HTTP face. Routes only: what is refused is in limits.py and admission.py, the work is in engine.py.

    POST /v1/score   POST /v1/completions   POST /v1/weights        with a bearer key
    GET /v1/models   GET /v1/capabilities                           with it too
    GET /livez   GET /readyz   GET /metrics                         without

One error shape for every path, an X-Request-Id on every answer. Prompts, contexts and keys are never logged or echoed.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from potstill.codec import JSON, SAFETENSORS, decode_request, encode_response
from potstill.wire import ScoreRequest, ScoreResponse, WireError
from teacher_server.admission import (
    Teacher,
    admit,
    answer_bytes,
    capabilities,
    check_json_answer,
    check_revision,
)
from teacher_server.batching import Job, ScoringQueue
from teacher_server.limits import Limits, Refusal
from teacher_server.metrics import Metrics
from teacher_server.openai_routes import completions
from teacher_server.service import ScoringService, check_json, media_type, read_body
from teacher_server.weights_route import Versions, weights

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def create_app(
    teacher: Teacher, queue: ScoringQueue, limits: Limits, key: str, versions: Versions | None = None
) -> ASGIApp:
    """The application. It owns `queue` and closes it, all pending work done, when the server stops.

    With `versions`, new weights may be pushed to the teacher.
    """
    service = ScoringService(teacher, queue, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _answer_errors_in_one_shape(app, service.metrics)
    guarded = [Depends(_bearer(key))]
    for router in (_teaching(service), completions(service)):
        app.include_router(router, prefix="/v1", dependencies=guarded)
    if versions is not None:
        app.include_router(weights(versions, service), prefix="/v1", dependencies=guarded)
    app.include_router(_watching(service))
    return NamedRequests(app, service.metrics)


def _teaching(service: ScoringService) -> APIRouter:
    router = APIRouter()
    teacher, limits = service.teacher, service.limits

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
        body_type, answer_type = media_type(request, JSON, SAFETENSORS), _answer_type(request)
        limit = min(limits.max_body_bytes, limits.max_json_bytes) if body_type == JSON else limits.max_body_bytes
        with service.visit() as place:
            body = await read_body(request, place, limit=limit, max_read_s=limits.max_read_s)
            asked, jobs = await service.aside(_understand, body, body_type, teacher, limits)
            del body
            if answer_type == JSON:
                check_json_answer(jobs, limits)
            place.reserve(answer_bytes(jobs))
            deadline_s = min(limits.max_deadline_s, (asked.deadline_ms or 1000 * limits.max_deadline_s) / 1000)
            identity, scores = await service.score(request, jobs, deadline=started + deadline_s)
            check_revision(asked, identity)
            answer = ScoreResponse(
                request_id=request.state.request_id,
                identity=identity,
                ids=tuple(item.id for item in asked.items),
                scores=tuple(scores),
            )
            return Response(await service.aside(encode_response, answer, answer_type), media_type=answer_type)

    return router


def _watching(service: ScoringService) -> APIRouter:
    router = APIRouter()

    @router.get("/livez")
    @router.get("/readyz")
    async def alive() -> dict[str, str]:
        """Both are one question here: the model is loaded before the server listens, and only its thread can die."""
        if not service.queue.alive:
            raise Refusal(503, "not_ready", "the scoring thread is not running", retry_after_s=5)
        return {"status": "ok"}

    @router.get("/metrics")
    async def numbers() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

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


def _understand(body: bytes, body_type: str, teacher: Teacher, limits: Limits) -> tuple[ScoreRequest, list[Job]]:
    if body_type == JSON:
        check_json(body, limits)
    try:
        asked = decode_request(body, body_type)
    except WireError as error:
        raise Refusal(400, "invalid_request", str(error), error.param) from None
    return asked, admit(asked, teacher, limits)


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
                self._metrics.answers.labels(status=str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, send_named)


def _answer_errors_in_one_shape(app: FastAPI, metrics: Metrics) -> None:
    def answer(request: Request, refusal: Refusal) -> JSONResponse:
        metrics.refusals.labels(code=refusal.code).inc()
        return JSONResponse(refusal.envelope(request.state.request_id), refusal.status, refusal.headers)

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
