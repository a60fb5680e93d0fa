"""Runs: submitted, listed, changed, steered, forked, deleted. What happens to them is in events.py."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

import yaml
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from orchestrator.service import submissions
from orchestrator.service.artifacts import delete_run as delete_with_artifacts
from orchestrator.service.artifacts import keep_used
from orchestrator.service.gate import JSON, JsonObject
from orchestrator.service.principals import Principal
from orchestrator.service.routes.asking import (
    Auditing,
    IdempotencyKey,
    Paging,
    Reader,
    State,
    Writer,
    created,
    listed,
    once,
)
from orchestrator.service.runs import Run, config_resource, run_resource
from orchestrator.service.runs import State as RunState
from orchestrator.service.scheduling import admit
from orchestrator.service.state import ServiceState
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.runs import NewRun
from orchestrator.service.submissions import Changes, Fork
from orchestrator.service.toml import dump_toml
from orchestrator.service.waits import briefly, durably
from potstill.errors import ServiceError

router = APIRouter(prefix="/v1/runs", tags=["runs"])


class Cancel(BaseModel):
    """How a run is ended."""

    model_config = ConfigDict(extra="forbid")
    mode: Literal["graceful", "immediate"] = "graceful"
    """graceful: it finishes its step and leaves a checkpoint; immediate: it ends at once."""
    reason: Annotated[str, Field(max_length=500)] = ""


class Resume(BaseModel):
    model_config = ConfigDict(extra="forbid")


@router.post(
    "",
    status_code=201,
    operation_id="create_run",
    openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": submissions.SCHEMA}}}},
)
async def create_run(
    body: JsonObject,
    who: Writer,
    state: State,
    audit: Auditing,
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[bool, Query()] = False,
) -> JSONResponse:
    """Submit a run: a RunConfig, with `priority`, `metadata` and `notes` beside it.

    It is on disk before the answer leaves. 200 when the same request had made it before, and for a dry run, which
    stores nothing and answers with the resolved config and the plan.
    """

    def prepare() -> tuple[submissions.Submission, NewRun | None]:
        submission = submissions.read(body, who, state.catalog)
        return submission, None if dry_run else ready(state, who, submission)

    submission, new = await run_in_threadpool(prepare)  # it reads files
    if new is None:
        return JSONResponse(_plan_resource(submission))
    request = once(who, idempotency_key, "/v1/runs", body)
    made, replayed = await durably(state.store, store_run, state, who, new, request, partial(audit, who, "run.create"))
    return created(run_resource(made), f"/v1/runs/{made.id}", replayed=replayed)


@router.get("", operation_id="list_runs")
async def list_runs(
    request: Request,
    who: Reader,
    state: State,
    page: Paging,
    status: Annotated[list[RunState] | None, Query()] = None,
    created_after: datetime | None = None,
) -> JSONResponse:
    """A page of runs by creation, newest first. `metadata[name]=value` keeps those that carry the pair."""
    after = None if created_after is None else created_after.timestamp()
    metadata = metadata_filter(request)

    def answer() -> JSONResponse:
        runs, more = state.store.runs.page(who, page, states=status or (), metadata=metadata, created_after=after)
        return JSONResponse(listed([run_resource(run) for run in runs], more))

    looks_for = bool(status or metadata or after is not None)
    return await (asyncio.to_thread(answer) if looks_for else briefly(state.store, answer))


@router.get("/{run_id}", operation_id="get_run")
async def get_run(run_id: str, who: Reader, state: State) -> JSONResponse:
    """One run. Its ETag is what PATCH asks for."""
    return await briefly(state.store, lambda: _answer(state.store.runs.get(run_id, who)))


@router.patch("/{run_id}", operation_id="update_run")
def update_run(
    run_id: str,
    body: Changes,
    who: Writer,
    state: State,
    audit: Auditing,
    if_match: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Change priority, metadata or notes. `If-Match` is the ETag that was read: 428 without it, 412 for an old one."""
    run = state.store.runs.edit(run_id, who, body.model_dump(exclude_none=True), revision=revision_in(if_match))
    audit(who, "run.update", run_id, **body.model_dump(exclude_none=True))
    state.supervisor.nudge()
    return _answer(run)


@router.delete("/{run_id}", status_code=204, operation_id="delete_run")
def delete_run(
    run_id: str, who: Writer, state: State, audit: Auditing, artifacts: Literal["keep", "delete"] = "keep"
) -> Response:
    """Forget a run that is at its end. Its folder stays unless `artifacts=delete`."""
    delete_with_artifacts(state.store, state.runs, run_id, who, with_folder=artifacts == "delete")
    audit(who, "run.delete", run_id, artifacts=artifacts)
    return Response(status_code=204)


@router.get(
    "/{run_id}/config",
    operation_id="get_run_config",
    response_model=None,
    responses={200: {"content": {JSON: {}, "application/toml": {}, "application/yaml": {}}}},
)
def get_config(run_id: str, who: Reader, state: State, format: Literal["json", "toml", "yaml"] = "json") -> Response:
    """The resolved config: everything that decides the run, with names where its client used names."""
    config = config_resource(state.store.runs.get(run_id, who))
    if format == "toml":
        return PlainTextResponse(dump_toml(config), media_type="application/toml")
    if format == "yaml":
        return PlainTextResponse(yaml.safe_dump(config, sort_keys=False), media_type="application/yaml")
    return JSONResponse(config)


@router.post("/{run_id}/cancel", status_code=202, operation_id="cancel_run")
def cancel_run(run_id: str, who: Writer, state: State, audit: Auditing, body: Cancel | None = None) -> JSONResponse:
    """Ask a run to stop: 202 while it stops, 200 when it has been cancelled, 409 when it ended otherwise."""
    asked = body or Cancel()
    run = state.store.runs.get(run_id, who)
    if asked.mode == "immediate":
        state.supervisor.hurry(run_id)
    if run.state not in {RunState.CANCELLING, RunState.CANCELLED}:
        wanted = RunState.CANCELLED if run.state is RunState.PAUSED else RunState.CANCELLING
        message = "a client asked to cancel the run" + (f": {asked.reason}" if asked.reason else "")
        run = state.store.runs.move(run_id, wanted, message)
        audit(who, "run.cancel", run_id, mode=asked.mode)
    state.supervisor.nudge()
    return _answer(run, 200 if run.state is RunState.CANCELLED else 202)


@router.post("/{run_id}/pause", status_code=202, operation_id="pause_run")
def pause_run(run_id: str, who: Writer, state: State, audit: Auditing) -> JSONResponse:
    """Have a run leave a checkpoint and give its processes back: 202 while it does, 200 when it is paused."""
    run = state.store.runs.get(run_id, who)
    if run.state not in {RunState.PAUSING, RunState.PAUSED}:
        wanted = RunState.PAUSED if run.state is RunState.QUEUED else RunState.PAUSING
        run = state.store.runs.move(run_id, wanted, "a client asked to pause the run")
        audit(who, "run.pause", run_id)
    state.supervisor.nudge()
    return _answer(run, 200 if run.state is RunState.PAUSED else 202)


@router.post("/{run_id}/resume", status_code=202, operation_id="resume_run")
def resume_run(run_id: str, who: Writer, state: State, audit: Auditing) -> JSONResponse:
    """Put a paused run into the queue again: it goes on from its last checkpoint. 409 for any other."""
    run = state.store.runs.get(run_id, who)
    if run.state is not RunState.PAUSED:
        raise ServiceError(f"run {run_id} is {run.state}: only a paused run is resumed", 409, "illegal_transition")
    run = state.store.runs.again(run_id, "a client asked to resume the run", who)
    audit(who, "run.resume", run_id)
    state.supervisor.nudge()
    return _answer(run, 202)


@router.post("/{run_id}/retry", status_code=202, operation_id="retry_run")
def retry_run(run_id: str, who: Writer, state: State, audit: Auditing) -> JSONResponse:
    """Have a run that failed or was cancelled try again, from its last checkpoint: another attempt of the same run."""
    run = state.store.runs.again(run_id, "a client asked to try again", who, retry=True)
    audit(who, "run.retry", run_id)
    state.supervisor.nudge()
    return _answer(run, 202)


@router.post("/{run_id}/fork", status_code=201, operation_id="fork_run")
def fork_run(
    run_id: str, body: Fork, who: Writer, state: State, audit: Auditing, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """A new run with this one's config and `overrides`; with `from_checkpoint` its student begins as that one."""
    parent = state.store.runs.get(run_id, who)
    model = None
    if body.from_checkpoint is not None:
        model = f"run/{run_id}/{body.from_checkpoint}"
    submission = submissions.read(submissions.fork_of(parent.submitted, body, model), who, state.catalog)
    request = once(who, idempotency_key, f"/v1/runs/{run_id}/fork", body.model_dump(mode="json"))
    origin = {"forked_from": run_id, "forked_checkpoint": body.from_checkpoint}
    new = ready(state, who, submission, **origin)
    made, replayed = store_run(state, who, new, request, partial(audit, who, "run.fork", parent=run_id))
    return created(run_resource(made), f"/v1/runs/{made.id}", replayed=replayed)


def ready(state: ServiceState, who: Principal, submission: submissions.Submission, **origin: str | None) -> NewRun:
    """What is to be stored of it, once its folder is free and the checkpoints that it names will stay."""
    new = submission.new_run(who, **origin)
    state.supervisor.check_free(new.id)
    keep_used(state.runs, new.config)
    return new


def store_run(
    state: ServiceState, who: Principal, new: NewRun, request: Once, audit: Callable[..., None]
) -> tuple[Run, bool]:
    """Store it and its record in one transaction, within its key's limits, and have the supervisor look."""
    runs = state.store.runs

    def admit_and_record(db: Any) -> None:
        admit(runs.usage(who.key_id, db), who.limits)
        audit(new.id, within=db)

    made, replayed = runs.create(new, request, admit_and_record)
    state.supervisor.nudge()
    return made, replayed


def _plan_resource(submission: submissions.Submission) -> dict[str, Any]:
    resolved = {key: value for key, value in submission.config.model_dump(mode="json").items() if key != "runs"}
    return {
        "object": "run.plan",
        "config": {**resolved, **{key: submission.named[key] for key in ("student", "teacher", "data")}},
        "plan": json.loads(json.dumps(submission.plan, default=str)),
    }


def _answer(run: Run, status: int = 200) -> JSONResponse:
    return JSONResponse(run_resource(run), status_code=status, headers={"ETag": f'"r{run.revision}"'})


def revision_in(if_match: str | None) -> int:
    """The revision that an If-Match header names. Raises ServiceError: 428 without one, 412 for a foreign one."""
    if if_match is None:
        raise ServiceError("send If-Match with the ETag that you read", 428, "if_match_missing")
    found = re.fullmatch(r'"r(\d{1,18})"', if_match.strip())
    if found is None:
        raise ServiceError("that If-Match is no ETag of this resource", 412, "revision_mismatch")
    return int(found[1])


def _set(table: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that are None, which TOML cannot say: left out they mean the same."""
    return {
        name: _set(value) if isinstance(value, dict) else value for name, value in table.items() if value is not None
    }


def metadata_filter(request: Request) -> dict[str, str]:
    found = (
        (re.fullmatch(r"metadata\[(.{1,64})\]", name), value) for name, value in request.query_params.multi_items()
    )
    return {match[1]: value for match, value in found if match is not None}
