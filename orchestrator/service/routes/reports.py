"""What runs report about themselves. Only the present job of a run may: by the token that it was launched with."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from orchestrator.reporting import Report
from orchestrator.service.gate import JsonObject
from orchestrator.service.routes.asking import State, bearer
from potstill.errors import ServiceError

router = APIRouter(prefix="/v1/runs", tags=["reports"])


def _run_token(run_id: str, secret: Annotated[str, Depends(bearer)], state: State) -> None:
    try:
        submission_id = state.store.runs.get(run_id).submission_id
    except ServiceError as error:
        if error.status != 404:
            raise
        submission_id = ""  # whether the run exists is not a stranger's to know
    if not state.signer.matches(submission_id, secret) or not submission_id:
        raise ServiceError("this is not the token of the run's present job", 401, "invalid_token")


@router.post("/{run_id}/events", operation_id="report_events", dependencies=[Depends(_run_token)])
def report(run_id: str, body: JsonObject, state: State) -> dict[str, int]:
    """A run's report about itself. Answers with the last number held of each log; 409 names the one that is wanted."""
    try:
        parsed = Report.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    return state.store.runs.report(run_id, parsed)
