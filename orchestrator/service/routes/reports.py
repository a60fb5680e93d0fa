"""What runs report about themselves. The gate has seen to it that only a run's present job does (authentication.py)."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from orchestrator.reporting import Report
from orchestrator.service.gate import JsonObject
from orchestrator.service.routes.asking import State

router = APIRouter(prefix="/v1/runs", tags=["reports"])


@router.post("/{run_id}/events", operation_id="report_events")
def report(run_id: str, body: JsonObject, state: State) -> dict[str, int]:
    """A run's report about itself. Answers with the last number held of each log; 409 names the one that is wanted."""
    try:
        parsed = Report.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None
    return state.store.runs.report(run_id, parsed)
