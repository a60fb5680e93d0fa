"""What the processes of a run wrote: plain text, by byte offset or Range, followed by asking again."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from orchestrator.service import run_logs
from orchestrator.service.ranges import part
from orchestrator.service.routes.asking import Reader, State
from potstill.errors import ServiceError

router = APIRouter(prefix="/v1/runs", tags=["logs"])


@router.get(
    "/{run_id}/logs",
    operation_id="get_logs",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/plain": {}}}, 206: {"content": {"text/plain": {}}}},
)
def get_logs(
    run_id: str,
    who: Reader,
    state: State,
    role: Literal["orchestrator", "learner", "rollout", "teacher"] = "orchestrator",
    rank: Annotated[int, Query(ge=0, lt=10**6)] = 0,
    offset: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
    tail: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    range: Annotated[str | None, Header(max_length=200)] = None,
) -> StreamingResponse:
    """From byte `offset` on, the last `tail` lines, a Range, or everything.

    To follow a log, ask again from `X-Next-Offset`, until `X-Log-Complete` is true. Control characters, escape
    sequences and bytes that are no UTF-8 arrive as question marks, one for each byte, so that offsets stay true.
    """
    if sum(way is not None for way in (offset, tail, range)) > 1:
        raise ServiceError("offset, tail and Range: send one of them", 400, "invalid_request")
    run = state.store.runs.get(run_id, who)  # before the log: what a run at its end has written is all there
    file = run_logs.open_log(state.runs, run, role, rank)
    try:
        if tail is not None:
            wanted = run_logs.last_lines(file, tail)
        elif range is not None:
            wanted = part(range, run_logs.size_of(file))
        else:
            wanted = run_logs.since(file, offset or 0)
    except BaseException:
        file.close()
        raise
    return StreamingResponse(
        run_logs.neutral_pieces(file, wanted),
        status_code=206 if wanted.partial else 200,
        headers=run_logs.headers_of(wanted, complete=run.state.final),
        media_type="text/plain; charset=utf-8",
    )
