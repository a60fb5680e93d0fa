"""The service's HTTP routes, and nothing else: each one reads its arguments, asks one object, and answers.

Refuses every /v1 request without a key (a run's own reports: without that run's token). What passes before a route,
and what a refusal looks like, is in gate.py; states are in runs.py, SQL in store.py, processes in jobs.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import ValidationError

import potstill
from orchestrator.reporting import Report
from orchestrator.service.gate import JsonObject, install
from orchestrator.service.jobs import Launcher
from orchestrator.service.runs import State, event_resource, run_resource
from orchestrator.service.store import Store
from orchestrator.service.supervisor import Supervisor
from potstill.config_file import parse
from potstill.errors import ConfigError, ServiceError

RETRY_MS = 3000
KEEPALIVE_S = 15.0
EVENTS_AT_A_TIME = 200


def create_app(
    store: Store, launcher: Launcher, *, runs: Path, hosts: Iterable[str] = (), poll_s: float = 1.0
) -> FastAPI:
    """The service over one database and one cluster. `runs` holds the runs' folders; `hosts` are further Host names.

    `poll_s` is the time between two looks at the cluster, and between two looks for new events of a followed run.
    """
    supervisor = Supervisor(store, launcher, runs=runs, poll_s=poll_s)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        supervisor.start()
        try:
            yield
        finally:
            await asyncio.to_thread(supervisor.stop)

    app = FastAPI(title="potstill", version=potstill.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.store, app.state.supervisor, app.state.poll_s = store, supervisor, poll_s
    install(app, hosts)
    app.include_router(_health)
    app.include_router(_runs)
    app.include_router(_reports)
    return app


def _the_store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _the_supervisor(request: Request) -> Supervisor:
    supervisor: Supervisor = request.app.state.supervisor
    return supervisor


Stored = Annotated[Store, Depends(_the_store)]
Supervised = Annotated[Supervisor, Depends(_the_supervisor)]


def _bearer(request: Request) -> str:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise ServiceError("send your key as `Authorization: Bearer …`", 401, "missing_key")
    return secret.strip()


def _api_key(secret: Annotated[str, Depends(_bearer)], store: Stored) -> str:
    key_id = store.key_id_of(secret)
    if key_id is None:
        raise ServiceError("this key is not known", 401, "invalid_key")
    return key_id


def _run_token(run_id: str, secret: Annotated[str, Depends(_bearer)], store: Stored) -> None:
    if not store.token_matches(run_id, secret):
        raise ServiceError("this is not the run's token", 401, "invalid_token")


_health = APIRouter()
_runs = APIRouter(prefix="/v1/runs", dependencies=[Depends(_api_key)])
_reports = APIRouter(prefix="/v1/runs", dependencies=[Depends(_run_token)])


@_health.get("/livez")
def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@_health.get("/readyz")
def ready(store: Stored, supervisor: Supervised) -> dict[str, str]:
    """The database and the cluster answer too; 503 otherwise."""
    store.ping()
    if not supervisor.healthy:
        raise ServiceError(supervisor.problem or "the supervisor of runs has ended", 503, "cluster_unavailable")
    return {"status": "ok"}


@_health.get("/version")
def version() -> dict[str, str]:
    return {"version": potstill.__version__}


@_runs.post("", status_code=201)
def create_run(
    body: JsonObject,
    key_id: Annotated[str, Depends(_api_key)],
    store: Stored,
    supervisor: Supervised,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> JSONResponse:
    """Check a RunConfig, store the run, and answer. It is on disk before the answer leaves; 200 when it was already."""
    if "runs" in body:
        raise ConfigError("runs: the service keeps its runs in a folder of its own; leave this setting out")
    config = parse(body | {"runs": str(supervisor.runs)}).model_dump(mode="json")
    supervisor.check_free(config["name"])
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    run, replayed = store.create_run(
        config["name"], config, key_id=key_id, idempotency_key=idempotency_key, body_digest=digest
    )
    supervisor.nudge()
    headers = {"Location": f"/v1/runs/{run.id}"} | ({"Idempotent-Replayed": "true"} if replayed else {})
    return JSONResponse(run_resource(run), status_code=200 if replayed else 201, headers=headers)


@_runs.get("")
def list_runs(
    store: Stored,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """A page of runs by creation, newest first; `after` is the last id of the page before."""
    runs, has_more = store.list_runs(limit=limit, after=after, ascending=order == "asc")
    return _page([run_resource(run) for run in runs], "id", has_more)


@_runs.get("/{run_id}")
def get_run(run_id: str, store: Stored) -> dict[str, Any]:
    return run_resource(store.get_run(run_id))


@_runs.get("/{run_id}/events", response_model=None)
def get_events(
    run_id: str,
    request: Request,
    store: Stored,
    after: Annotated[int, Query(ge=0, lt=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    last_event_id: Annotated[int | None, Header(ge=0, lt=2**53)] = None,
) -> Response | dict[str, Any]:
    """Events with seq > after: a page, or, for `Accept: text/event-stream`, everything from there to the run's end."""
    store.get_run(run_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        start = after if last_event_id is None else last_event_id
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventSourceResponse(_follow(store, run_id, start, request.app.state.poll_s), headers=headers)
    events = store.list_events(run_id, after=after, limit=limit + 1)
    return _page([event_resource(event) for event in events[:limit]], "seq", len(events) > limit)


@_runs.post("/{run_id}/cancel", status_code=202)
def cancel_run(run_id: str, store: Stored, supervisor: Supervised) -> JSONResponse:
    """Ask a run to stop: 202 while it stops, 200 when it has been cancelled, 409 when it ended otherwise."""
    run = store.get_run(run_id)
    if run.state not in {State.CANCELLING, State.CANCELLED}:
        run = store.move(run_id, State.CANCELLING, "a client asked to cancel the run")
        supervisor.nudge()
    return JSONResponse(run_resource(run), status_code=200 if run.state is State.CANCELLED else 202)


@_reports.post("/{run_id}/events")
def report(run_id: str, body: JsonObject, store: Stored) -> dict[str, int]:
    """A run's report about itself. Answers with the last number held of each log; 409 names the one that is wanted."""
    try:
        parsed = Report.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    return store.append(run_id, parsed)


def _page(data: list[dict[str, Any]], key: str, has_more: bool) -> dict[str, Any]:
    first, last = (data[0][key], data[-1][key]) if data else (None, None)
    return {"object": "list", "data": data, "has_more": has_more, "first_id": first, "last_id": last}


async def _follow(store: Store, run_id: str, after: int, poll_s: float) -> AsyncIterator[bytes]:
    """Replay from the database, then its tail. Everything comes from there, so a stream can be resumed anywhere."""
    yield format_sse_event(retry=RETRY_MS)
    heard = time.monotonic()
    while True:
        run = await asyncio.to_thread(store.get_run, run_id)  # before the events: a final run's are all there
        events = await asyncio.to_thread(store.list_events, run_id, after=after, limit=EVENTS_AT_A_TIME)
        for event in events:
            data = json.dumps(event_resource(event))
            yield format_sse_event(event="run.event", id=str(event.seq), data_str=data)
        if events:
            after, heard = events[-1].seq, time.monotonic()
        elif run.state.final:
            yield format_sse_event(event="end", data_str=json.dumps({"status": run.state.value}))
            return
        elif time.monotonic() - heard > KEEPALIVE_S:
            yield KEEPALIVE_COMMENT
            heard = time.monotonic()
        if not events:
            await asyncio.sleep(poll_s)
