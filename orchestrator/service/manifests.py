"""The checkpoints that lie in a run's folder, read from their manifests: nothing is listed that is not complete.

A learner puts a checkpoint into place with one rename, so a folder step-N with a manifest is whole, and one that is
being written is not there yet. A manifest is read as a stranger's: names in it that would lead elsewhere, and files
whose size is another, make the checkpoint `damaged`, from which nothing is handed out.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.service import confined
from orchestrator.service.runs import rfc3339
from orchestrator.service.store.checkpoints import Keeping
from potstill.errors import ServiceError
from potstill.manifest import MANIFEST

NAME = re.compile(r"step-[0-9]{1,12}")
MAX_MANIFEST_BYTES = 16 << 20
MODEL = "model/"
ADAPTER = "adapter/"


class StoredFile(BaseModel):
    """What a manifest says of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, lt=2**53)]


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    step: Annotated[int, Field(ge=0, lt=2**53)]
    files: Annotated[dict[str, StoredFile], Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One that is in place. `files` are those of its manifest, and the manifest itself, by path; none where it has no
    manifest that can be read."""

    run: str
    name: str
    files: Mapping[str, StoredFile]
    created_at: float
    damaged: bool

    @property
    def step(self) -> int:
        return int(self.name.removeprefix("step-"))

    @property
    def kind(self) -> str:
        """adapter: trained with LoRA, adapter/ has it alone and model/ has it merged; full: all weights are its own."""
        return "adapter" if any(name.startswith(ADAPTER) for name in self.files) else "full"

    def parts(self, name: str) -> tuple[str, ...]:
        """Where a file of it lies below the folder of all runs."""
        return (self.run, "checkpoints", self.name, *name.split("/"))

    def resource(self, keeping: Keeping) -> dict[str, Any]:
        """The checkpoint as the API shows it."""
        files = [{"name": name, "bytes": f.bytes, "sha256": f.sha256} for name, f in sorted(self.files.items())]
        return {
            "id": self.name,
            "object": "checkpoint",
            "run": self.run,
            "step": self.step,
            "kind": self.kind,
            "status": "damaged" if self.damaged else "ready",
            "bytes": sum(f.bytes for f in self.files.values()),
            "files": files,
            "created_at": rfc3339(self.created_at),
            "expires_at": rfc3339(keeping.expires_at),
            "published_as": keeping.published_as,
        }


def names_of(runs: Path, run_id: str) -> list[str]:
    """Of the checkpoints of a run, oldest first."""
    found = [name for name in confined.names(runs, run_id, "checkpoints") if NAME.fullmatch(name)]
    return sorted(found, key=lambda name: int(name.removeprefix("step-")))


def checkpoints_of(runs: Path, run_id: str) -> list[Checkpoint]:
    """Oldest first."""
    read = (_read(runs, run_id, name) for name in names_of(runs, run_id))
    return [checkpoint for checkpoint in read if checkpoint is not None]


def checkpoint_of(runs: Path, run_id: str, name: str) -> Checkpoint:
    """Raises ServiceError (404) when there is none of that name, or none any more."""
    found = _read(runs, run_id, name) if NAME.fullmatch(name) else None
    if found is None:
        raise ServiceError("the run has no such checkpoint, or not yet, or no longer", 404, "checkpoint_not_found")
    return found


def open_of(runs: Path, checkpoint: Checkpoint, name: str) -> BufferedReader:
    """A file of the checkpoint, by its name in the manifest. Raises ServiceError: 404, and 500 for a damaged one."""
    if checkpoint.damaged:
        raise _damaged(checkpoint)
    if name not in checkpoint.files:
        raise ServiceError("the checkpoint has no file of that name", 404, "checkpoint_file_not_found")
    try:
        file = confined.open_file(runs, *checkpoint.parts(name))
    except FileNotFoundError:
        raise _damaged(checkpoint) from None
    if os.fstat(file.fileno()).st_size != checkpoint.files[name].bytes:
        file.close()
        raise _damaged(checkpoint)
    return file


def _damaged(checkpoint: Checkpoint) -> ServiceError:
    message = f"{checkpoint.name} is damaged: a file is missing or has another size than its manifest says"
    return ServiceError(message, 500, "checkpoint_damaged")


def _read(runs: Path, run_id: str, name: str) -> Checkpoint | None:
    try:
        with confined.open_file(runs, run_id, "checkpoints", name, MANIFEST) as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
            created_at = os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    files = _files(content)
    whole = bool(files) and all(_has_size(runs, (run_id, "checkpoints", name), inner, files[inner]) for inner in files)
    return Checkpoint(run=run_id, name=name, files=files, created_at=created_at, damaged=not whole)


def _files(content: bytes) -> dict[str, StoredFile]:
    """Of a manifest, itself included; nothing when it is none."""
    if len(content) > MAX_MANIFEST_BYTES:
        return {}
    try:
        files = dict(_Manifest.model_validate_json(content).files)
    except ValidationError:
        return {}
    if any(part in {"", ".", ".."} or "\\" in part or "\0" in part for name in files for part in name.split("/")):
        return {}
    return files | {MANIFEST: StoredFile(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))}


def _has_size(runs: Path, place: tuple[str, ...], name: str, stored: StoredFile) -> bool:
    *outer, last = name.split("/")
    try:
        with confined.folder(runs, *place, *outer) as inside:
            found = os.stat(last, dir_fd=inside, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == stored.bytes
