"""Files of prompts: uploaded, listed, downloaded, deleted. Their shape is that of OpenAI's files, and a little more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.requests import ClientDisconnect

from orchestrator.service.forms import Form
from orchestrator.service.gate import FORM
from orchestrator.service.principals import Principal
from orchestrator.service.prompt_files import Purpose
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
from orchestrator.service.store.files import File
from orchestrator.service.uploads import Incoming, Label, Uploads, label_of, too_large
from potstill.errors import ServiceError

router = APIRouter(prefix="/v1/files", tags=["files"])

_FORM_BYTES = 2**16  # that a form has beside its file
_MEDIA_TYPES = {"jsonl": "application/jsonl", "parquet": "application/vnd.apache.parquet"}
_BODIES = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file", "purpose"],
            "additionalProperties": False,
            "properties": {
                "file": {"type": "string", "format": "binary"},
                "purpose": {"type": "string", "enum": ["prompts", "eval", "fine-tune"]},
            },
        }
    },
    **{media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in _MEDIA_TYPES.values()},
}


@router.post(
    "",
    status_code=201,
    operation_id="upload_file",
    openapi_extra={"requestBody": {"required": True, "content": _BODIES}},
)
async def upload_file(
    request: Request,
    who: Writer,
    state: State,
    audit: Auditing,
    idempotency_key: IdempotencyKey = None,
    filename: Annotated[str | None, Query(max_length=255)] = None,
    purpose: Annotated[str | None, Query(max_length=20)] = None,
) -> JSONResponse:
    """Upload prompts as JSON Lines or Parquet: a form with `file` and `purpose`, or the bytes alone as the body.

    With the bytes alone, `filename` and `purpose` are in the query. Every line is read as a run will read it; a file
    with a wrong one is refused, with the first twenty named.
    """
    uploads = state.catalog.uploads
    announced = _announced(request, uploads)
    room = await asyncio.to_thread(state.store.files.room, who) if idempotency_key is None else None
    if room is not None:
        room.require(announced)
    with uploads.incoming(room) as incoming:
        label = await _receive(request, incoming, filename, purpose, silence_s=uploads.silence_s)
        file, replayed = await asyncio.to_thread(_keep, uploads, incoming, label, who, idempotency_key)
    if not replayed:
        await asyncio.to_thread(audit, who, "file.upload", file.id)
    return created(_resource(file), f"/v1/files/{file.id}", replayed=replayed)


@router.get("", operation_id="list_files")
def list_files(who: Reader, state: State, page: Paging, purpose: Purpose | None = None) -> dict[str, Any]:
    """A page of files, newest first."""
    files, more = state.store.files.page(who, page, purpose=purpose)
    return listed([_resource(file) for file in files], more)


@router.get("/{file_id}", operation_id="get_file")
def get_file(file_id: str, who: Reader, state: State) -> dict[str, Any]:
    """What is known of one file."""
    return _resource(state.store.files.get(file_id, who))


@router.get(
    "/{file_id}/content",
    operation_id="get_file_content",
    response_class=FileResponse,
    responses={200: {"content": {media_type: {} for media_type in _MEDIA_TYPES.values()}}},
)
def get_content(file_id: str, who: Reader, state: State) -> FileResponse:
    """The file as it was sent."""
    file = state.store.files.get(file_id, who)
    headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": f'attachment; filename="{file.id}"'}
    return FileResponse(state.catalog.uploads.content(file), media_type=_MEDIA_TYPES[file.format], headers=headers)


@router.delete("/{file_id}", operation_id="delete_file")
def delete_file(file_id: str, who: Writer, state: State, audit: Auditing) -> dict[str, Any]:
    """Delete a file. 409 while a run names it that is not at its end."""
    state.catalog.uploads.delete(file_id, who)
    audit(who, "file.delete", file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _announced(request: Request, uploads: Uploads) -> int:
    """The size that the headers name, 0 where they name none. Raises ServiceError: 413, 415."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ServiceError("send the file without a content encoding", 415, "content_encoding")
    length = request.headers.get("content-length", "0")
    size = int(length) if length.isdecimal() and len(length) < 20 else 0
    if size > uploads.max_bytes + _FORM_BYTES:
        raise too_large(uploads.max_bytes)
    return max(0, size - _FORM_BYTES)


async def _receive(
    request: Request, incoming: Incoming, filename: str | None, purpose: str | None, *, silence_s: float
) -> Label:
    """Write the body to `incoming` as it comes, a piece at a time; returns what the client says of it."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != FORM:
        label = label_of(filename or "", purpose or "")
        await _pour(request, incoming.write, silence_s)
        return label
    if filename is not None or purpose is not None:
        raise ServiceError("filename and purpose are in the form, not in the query", 400, "invalid_form")
    form = Form(content_type, incoming.write, fields=("purpose",))
    await _pour(request, form.feed, silence_s)
    name, fields = form.finish()
    return label_of(name, fields.get("purpose", ""))


async def _pour(request: Request, into: Callable[[bytes], None], silence_s: float) -> None:
    pieces = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(pieces, None), silence_s)
        except TimeoutError:
            raise ServiceError(f"nothing came for {silence_s:g} s", 408, "upload_timeout") from None
        except ClientDisconnect:
            raise ServiceError("the client left", 400, "upload_cut") from None
        if piece is None:
            return
        await asyncio.to_thread(into, piece)


def _keep(
    uploads: Uploads, incoming: Incoming, label: Label, who: Principal, idempotency_key: str | None
) -> tuple[File, bool]:
    said = {"sha256": incoming.sha256, "filename": label.filename, "purpose": label.purpose}
    request = once(who, idempotency_key, "/v1/files", json.dumps(said, sort_keys=True).encode())
    return uploads.keep(incoming, label, who, request)


def _resource(file: File) -> dict[str, Any]:
    """As OpenAI's clients read it, and what else is known. `created_at` is unix seconds, as they want it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "format": file.format,
        "sha256": file.sha256,
        "rows": file.rows,
        "columns": list(file.columns),
    }
