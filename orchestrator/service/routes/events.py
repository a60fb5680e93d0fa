"""What happened to a run, in order: a page, or a stream that can be resumed behind any event."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse

from orchestrator.service.routes.asking import Reader, State, listed
from orchestrator.service.runs import event_resource
from orchestrator.service.store.events import is_much
from orchestrator.service.waits import briefly

router = APIRouter(prefix="/v1/runs", tags=["events"])

STREAM = "text/event-stream"


@router.get(
    "/{run_id}/events",
    operation_id="list_events",
    response_model=None,
    responses={200: {"content": {"application/json": {}, STREAM: {}}}},
)
async def list_events(
    run_id: str,
    request: Request,
    who: Reader,
    state: State,
    after: Annotated[int, Query(ge=0, lt=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    level: Literal["debug", "info", "warn", "error"] | None = None,
    type: Annotated[str | None, Query(max_length=100)] = None,
    last_event_id: Annotated[int | None, Header(ge=0, lt=2**53)] = None,
) -> Response:
    """Events with seq > after: a page, or, for `Accept: text/event-stream`, everything from there to the run's end."""
    if STREAM in request.headers.get("accept", ""):
        await briefly(state.store, state.store.runs.require, run_id, who)
        state.following.admit(who)
        start = after if last_event_id is None else last_event_id
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventSourceResponse(state.following.stream(run_id, start, who), headers=headers)

    most = limit + 1  # whether there are more

    def page() -> JSONResponse:
        state.store.runs.require(run_id, who)
        events = state.store.events.list(run_id, after=after, limit=most, level=level, type=type)
        return JSONResponse(listed([event_resource(event) for event in events[:limit]], len(events) > limit, "seq"))

    return await (asyncio.to_thread(page) if is_much(most, level, type) else briefly(state.store, page))
