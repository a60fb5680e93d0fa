"""What a run measured of each of its steps: as many points as are asked for, as columns, CSV or Parquet."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from orchestrator.service.routes.asking import Reader, State
from orchestrator.service.tables import MEDIA, table_of

router = APIRouter(prefix="/v1/runs", tags=["metrics"])


@router.get(
    "/{run_id}/metrics",
    operation_id="get_metrics",
    response_model=None,
    responses={200: {"content": {"application/json": {}, "text/csv": {}, "application/vnd.apache.parquet": {}}}},
)
def get_metrics(
    run_id: str,
    who: Reader,
    state: State,
    keys: Annotated[str | None, Query(max_length=8192)] = None,
    after_step: Annotated[int, Query(ge=0, lt=2**53)] = 0,
    max_points: Annotated[int, Query(ge=10, le=5000)] = 1000,
    format: Literal["json", "csv", "parquet"] = "json",
) -> Response:
    """The steps after `after_step`; `keys` are some of the columns, separated by commas.

    Where there are more than `max_points` steps, those stay that draw the same line: of every stretch and column the
    first, last, smallest and largest. A number that was not measured is null, never zero.
    """
    state.store.runs.get(run_id, who)
    wanted = None if keys is None else [key for key in keys.split(",") if key]
    reported = state.store.events.metrics(run_id, after_step=after_step)
    table = table_of(run_id, reported, keys=wanted, max_points=max_points)
    if format == "json":
        return JSONResponse(table.resource())
    content = table.csv() if format == "csv" else table.parquet()
    headers = {"Content-Disposition": f'attachment; filename="{run_id}-metrics.{format}"'}
    return Response(content, media_type=MEDIA[format], headers=headers)
