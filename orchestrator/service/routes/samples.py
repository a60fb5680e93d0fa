"""Rollouts to look at: what the student wrote, and how likely student and teacher found each token."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from orchestrator.service.principals import Scope
from orchestrator.service.routes.asking import Reader, State, listed
from orchestrator.service.samples import samples_of
from potstill.errors import ServiceError

router = APIRouter(prefix="/v1/runs", tags=["samples"])


@router.get("/{run_id}/samples", operation_id="list_samples", response_model=None)
def list_samples(
    run_id: str,
    who: Reader,
    state: State,
    step: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=40)] = None,
) -> JSONResponse:
    """Newest first; `step` keeps those of one step, and `steps` says which steps have any.

    What only a teacher was shown is left out unless the key has the scope `samples:privileged`.
    """
    state.store.runs.get(run_id, who)
    samples = samples_of(state.runs, run_id, privileged=who.may(Scope.SAMPLES_PRIVILEGED))
    steps = sorted({sample["step"] for sample in samples})
    found = [sample for sample in samples if step is None or sample["step"] == step]
    if after is not None:
        ids = [sample["id"] for sample in found]
        if after not in ids:
            raise ServiceError("`after` names no item of this list", 400, "bad_cursor")
        found = found[ids.index(after) + 1 :]
    return JSONResponse(listed(found[:limit], len(found) > limit) | {"steps": steps})
