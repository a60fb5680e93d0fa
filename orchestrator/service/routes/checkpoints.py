"""Checkpoints of a run: listed, downloaded file by file, kept for a while, published as models, removed."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.service.artifacts import delete_checkpoint
from orchestrator.service.downloads import download
from orchestrator.service.manifests import Checkpoint, checkpoint_of, checkpoints_of, open_of
from orchestrator.service.publishing import publish, withdraw
from orchestrator.service.routes.asking import Auditing, Paging, Reader, State, Writer, listed
from orchestrator.service.state import ServiceState
from orchestrator.service.store.checkpoints import Keeping
from potstill.errors import ServiceError

router = APIRouter(prefix="/v1/runs/{run_id}/checkpoints", tags=["checkpoints"])

MAX_TTL_S = 10 * 365 * 86400
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}},
    206: {"content": {"application/octet-stream": {}}, "description": "The Range that was asked for"},
    304: {"description": "If-None-Match names it"},
}


class Publication(BaseModel):
    """Under which name a checkpoint's model is to be had."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(max_length=200)]


class TimeToLive(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    seconds: Annotated[float, Field(ge=0, le=MAX_TTL_S)] | None
    """From now on; null keeps it until it is deleted."""


@router.get("", operation_id="list_checkpoints")
def list_checkpoints(run_id: str, who: Reader, state: State, page: Paging) -> dict[str, Any]:
    """Those that are complete and still there, newest first. One that is being written is not there yet."""
    state.store.runs.get(run_id, who)
    keepings = state.store.checkpoints.of_run(run_id)
    there = checkpoints_of(state.runs, run_id)
    found = [_resource(one, keepings) for one in (there if page.ascending else reversed(there))]
    if page.after is not None:
        names = [one["id"] for one in found]
        if page.after not in names:
            raise ServiceError("`after` names no item of this list", 400, "bad_cursor")
        found = found[names.index(page.after) + 1 :]
    return listed(found[: page.limit], len(found) > page.limit)


@router.get("/{checkpoint}", operation_id="get_checkpoint")
def get_checkpoint(run_id: str, checkpoint: str, who: Reader, state: State) -> dict[str, Any]:
    """One checkpoint, with the size and sha256 of each of its files."""
    state.store.runs.get(run_id, who)
    return _shown(state, checkpoint_of(state.runs, run_id, checkpoint))


@router.get(
    "/{checkpoint}/files/{path:path}",
    operation_id="download_checkpoint_file",
    response_class=Response,
    responses=ANSWERS,
)
def download_checkpoint_file(
    run_id: str, checkpoint: str, path: str, request: Request, who: Reader, state: State
) -> Response:
    """A file, by its name in the checkpoint's `files`; whole, or one `Range` of it.

    Its ETag is its sha256, and so is `Repr-Digest`: compare what arrived with it.
    """
    state.store.runs.get(run_id, who)
    found = checkpoint_of(state.runs, run_id, checkpoint)
    return download(open_of(state.runs, found, path), found.files[path], path, request.headers)


@router.put("/{checkpoint}/ttl", operation_id="set_checkpoint_ttl")
def set_checkpoint_ttl(
    run_id: str, checkpoint: str, body: TimeToLive, who: Writer, state: State, audit: Auditing
) -> dict[str, Any]:
    """Have it removed after so many seconds. What somebody still needs outlives its time until nobody does."""
    state.store.runs.get(run_id, who)
    found = checkpoint_of(state.runs, run_id, checkpoint)
    expires_at = None if body.seconds is None else time.time() + body.seconds
    state.store.checkpoints.note(run_id, checkpoint, expires_at=expires_at, deleted_at=None)
    audit(who, "checkpoint.ttl", f"{run_id}/{checkpoint}", seconds=body.seconds)
    return _shown(state, found)


@router.post("/{checkpoint}/publish", operation_id="publish_checkpoint", status_code=201)
def publish_checkpoint(
    run_id: str, checkpoint: str, body: Publication, who: Writer, state: State, audit: Auditing
) -> JSONResponse:
    """Give its model a name by which later runs may begin with it. 200 when it has that name already, 409 when the name
    is taken. Every file is compared with its digest before."""
    run = state.store.runs.get(run_id, who)
    found = checkpoint_of(state.runs, run_id, checkpoint)
    state.catalog.check_new_model(body.name)
    fresh = publish(state.store, state.runs, run, checkpoint, body.name)
    if fresh:
        audit(who, "checkpoint.publish", f"{run_id}/{checkpoint}", name=body.name)
        state.store.runs.remark(run_id, "checkpoint.published", f"{checkpoint} is published as {body.name}")
    return JSONResponse(_shown(state, found), status_code=201 if fresh else 200)


@router.delete("/{checkpoint}/publish", operation_id="withdraw_checkpoint", status_code=204)
def withdraw_checkpoint(run_id: str, checkpoint: str, who: Writer, state: State, audit: Auditing) -> Response:
    """Take a published model's name back; the checkpoint stays. 409 while an unfinished run uses the model."""
    run = state.store.runs.get(run_id, who)
    name = withdraw(state.store, state.runs, run, checkpoint)
    audit(who, "checkpoint.withdraw", f"{run_id}/{checkpoint}", name=name)
    state.store.runs.remark(run_id, "checkpoint.withdrawn", f"{checkpoint} is no longer published as {name}")
    return Response(status_code=204)


@router.delete("/{checkpoint}", operation_id="delete_checkpoint", status_code=204)
def remove_checkpoint(run_id: str, checkpoint: str, who: Writer, state: State, audit: Auditing) -> Response:
    """Remove it. 409 while it is published, while the run may need it to go on, or while another run begins with it."""
    run = state.store.runs.get(run_id, who)
    delete_checkpoint(state.store, state.runs, run, checkpoint)
    audit(who, "checkpoint.delete", f"{run_id}/{checkpoint}")
    state.store.runs.remark(run_id, "checkpoint.deleted", f"{checkpoint} was deleted", checkpoint=checkpoint)
    return Response(status_code=204)


def _shown(state: ServiceState, checkpoint: Checkpoint) -> dict[str, Any]:
    return _resource(checkpoint, state.store.checkpoints.of_run(checkpoint.run))


def _resource(checkpoint: Checkpoint, keepings: dict[str, Keeping]) -> dict[str, Any]:
    return checkpoint.resource(keepings.get(checkpoint.name, Keeping()))
