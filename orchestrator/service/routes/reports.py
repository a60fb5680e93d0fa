"""What runs report about themselves. The gate has seen to it that only a run's present job does (authentication.py)."""

from __future__ import annotations

from fastapi import APIRouter

from orchestrator.reporting import Report
from orchestrator.service.routes.asking import State
from orchestrator.service.waits import durably

router = APIRouter(prefix="/v1/runs", tags=["reports"])


@router.post("/{run_id}/events", operation_id="report_events")
async def report(run_id: str, body: Report, state: State) -> dict[str, int]:
    """A run's report about itself. Answers with the last number held of each log; 409 names the one that is wanted."""
    return await durably(state.store, state.store.runs.report, run_id, body)
