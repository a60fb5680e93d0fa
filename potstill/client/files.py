"""The calls about uploaded files."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from potstill.client.answers import as_nothing, as_object, ask, path
from potstill.client.checkpoints import fetch
from potstill.client.landing import Part, check_free, partial, take_place
from potstill.client.resources import File, Page
from potstill.client.runs import idempotency
from potstill.client.steps import Aside, Call, Program, Upload
from potstill.errors import ConfigError

MEDIA_TYPES = {".jsonl": "application/jsonl", ".parquet": "application/vnd.apache.parquet"}
UPLOAD_S = 600.0  # for the service to read a large file to its end


def upload_file(
    file: str | os.PathLike[str],
    *,
    purpose: str = "prompts",
    filename: str | None = None,
    idempotency_key: str | None = None,
) -> Call[File]:
    """Upload a .jsonl or .parquet file, from disk; `filename`: how it is called there. Its id goes into data.path."""
    local = Path(file)
    media_type = MEDIA_TYPES.get(local.suffix)
    if media_type is None:
        raise ConfigError(f"{local}: data ends in {' or '.join(MEDIA_TYPES)}")
    if not local.is_file():
        raise ConfigError(f"{local}: there is no such file")
    return Call(
        method="POST",
        path="/v1/files",
        params={"filename": filename or local.name, "purpose": purpose},
        upload=Upload(path=local, media_type=media_type),
        headers=idempotency(idempotency_key),
        reads=as_object,
        timeout_s=UPLOAD_S,
    )


def list_files(*, purpose: str | None = None, limit: int = 20, after: str | None = None) -> Call[Page[File]]:
    """A page of files, newest first."""
    params = {"purpose": purpose, "limit": limit, "after": after}
    return Call(method="GET", path="/v1/files", params=params, reads=as_object)


def get_file(file_id: str) -> Call[File]:
    """What is known of a file."""
    return Call(method="GET", path=path("v1", "files", file_id), reads=as_object)


def download_file(file_id: str, to: str | os.PathLike[str]) -> Program[Path]:
    """Bring a file to the place `to`, which is free, verified; resumed as download_checkpoint is."""
    place = Path(to)
    check_free(place)
    file = yield from ask(get_file(file_id))
    part = Part(path=partial(place), size=file["bytes"], sha256=file["sha256"])
    yield from fetch(path("v1", "files", file_id, "content"), part)
    yield Aside(functools.partial(take_place, partial(place), place))
    return place


def delete_file(file_id: str) -> Call[None]:
    """Remove a file."""
    return Call(method="DELETE", path=path("v1", "files", file_id), reads=as_nothing)
