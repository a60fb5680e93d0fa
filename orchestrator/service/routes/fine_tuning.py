"""Fine-tuning jobs for OpenAI's clients: runs under another name. What /v1/runs would refuse is refused here too."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from orchestrator.service import submissions
from orchestrator.service.confined import names
from orchestrator.service.manifests import NAME, checkpoints_of
from orchestrator.service.openai_shapes import (
    NewJob,
    event_number,
    job_checkpoint_resource,
    job_event_resource,
    job_resource,
    model_name,
    said_of_the_job,
    submission_of,
)
from orchestrator.service.principals import Principal
from orchestrator.service.routes import runs
from orchestrator.service.routes.asking import Auditing, IdempotencyKey, Paging, Reader, State, Writer, listed, once
from orchestrator.service.runs import Run
from orchestrator.service.runs import State as RunState
from orchestrator.service.state import ServiceState
from orchestrator.service.store.checkpoints import Keeping
from potstill.errors import ServiceError

PREFIX = "/v1/fine_tuning/jobs"
router = APIRouter(prefix=PREFIX, tags=["fine-tuning"])

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=200)]


@router.post("", operation_id="create_fine_tuning_job")
def create_job(
    body: NewJob, who: Writer, state: State, audit: Auditing, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Submit a run as a fine-tuning job. Settings beyond model and file go into `method.distillation`."""
    meant = submission_of(body)
    with said_of_the_job():
        submission = submissions.read(meant, who, state.catalog)
    request = once(who, idempotency_key, PREFIX, body.model_dump(mode="json"))
    new = runs.ready(state, who, submission)
    made, replayed = runs.store_run(state, who, new, request, partial(audit, who, "run.create"))
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    return JSONResponse(job_resource(made, None), headers=headers)


@router.get("", operation_id="list_fine_tuning_jobs")
def list_jobs(request: Request, who: Reader, state: State, page: Paging) -> dict[str, Any]:
    """A page of jobs, newest first: every run of the key's owner. `metadata[name]=value` as at /v1/runs."""
    found, more = state.store.runs.page(who, page, metadata=runs.metadata_filter(request))
    return listed([_shown(state, run) for run in found], more)


@router.get("/{job_id}", operation_id="get_fine_tuning_job")
def get_job(job_id: str, who: Reader, state: State) -> dict[str, Any]:
    """One job. Once it has succeeded, `fine_tuned_model` is what another job may name as its `model`."""
    return _job(state, job_id, who)


@router.post("/{job_id}/cancel", operation_id="cancel_fine_tuning_job")
def cancel_job(job_id: str, who: Writer, state: State, audit: Auditing) -> dict[str, Any]:
    """Ask a job to stop. Its status is `running` until it has, then `cancelled`."""
    runs.cancel_run(job_id, who, state, audit)
    return _job(state, job_id, who)


@router.post("/{job_id}/pause", operation_id="pause_fine_tuning_job")
def pause_job(job_id: str, who: Writer, state: State, audit: Auditing) -> dict[str, Any]:
    """Have a job leave a checkpoint and give its processes back: `pausing`, then `paused`."""
    runs.pause_run(job_id, who, state, audit)
    return _job(state, job_id, who)


@router.post("/{job_id}/resume", operation_id="resume_fine_tuning_job")
def resume_job(job_id: str, who: Writer, state: State, audit: Auditing) -> dict[str, Any]:
    """Put a paused job into the queue again: it goes on from its last checkpoint."""
    runs.resume_run(job_id, who, state, audit)
    return _job(state, job_id, who)


@router.get("/{job_id}/events", operation_id="list_fine_tuning_events")
def list_job_events(job_id: str, who: Reader, state: State, limit: Limit = 20, after: After = None) -> dict[str, Any]:
    """A page of a job's events, newest first."""
    state.store.runs.get(job_id, who)
    newest = state.store.events.last(job_id)
    if after is not None:
        newest = min(newest, event_number(job_id, after) - 1)
    start = max(0, newest - limit)  # numbers have no gaps, so a page is a range of them
    events = state.store.events.list(job_id, after=start, limit=newest - start) if start < newest else []
    return listed([job_event_resource(job_id, event) for event in reversed(events)], start > 0)


@router.get("/{job_id}/checkpoints", operation_id="list_fine_tuning_checkpoints")
def list_job_checkpoints(
    job_id: str, who: Reader, state: State, limit: Limit = 10, after: After = None
) -> dict[str, Any]:
    """A page of a job's checkpoints, newest first. Their files are at /v1/runs/{id}/checkpoints."""
    state.store.runs.get(job_id, who)
    kept = state.store.checkpoints.of_run(job_id)
    losses = {int(step["step"] or 0): step.get("loss") for step in state.store.events.metrics(job_id)}
    found = [
        job_checkpoint_resource(one, kept.get(one.name, Keeping()), losses.get(one.step))
        for one in reversed(checkpoints_of(state.runs, job_id))
        if not one.damaged
    ]
    if after is not None:
        ids = [one["id"] for one in found]
        if after not in ids:
            raise ServiceError("`after` names no checkpoint of this job", 400, "bad_cursor")
        found = found[ids.index(after) + 1 :]
    return listed(found[:limit], len(found) > limit)


def _job(state: ServiceState, job_id: str, who: Principal) -> dict[str, Any]:
    return _shown(state, state.store.runs.get(job_id, who))


def _shown(state: ServiceState, run: Run) -> dict[str, Any]:
    """A job, and the model that it made: its newest checkpoint."""
    model = None
    if run.state is RunState.SUCCEEDED:
        there = [name for name in names(state.runs, run.id, "checkpoints") if NAME.fullmatch(name)]
        newest = max(there, key=lambda name: int(name.removeprefix("step-")), default=None)
        if newest is not None:
            model = model_name(run.id, newest, state.store.checkpoints.of_run(run.id).get(newest, Keeping()))
    return job_resource(run, model)
