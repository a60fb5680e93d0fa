"""What a run cannot lose is on disk whole, or it is not there: files and folders, placed by one rename.

    .name.3f2a…     written beside its place, synced          left by a killed process: invisible, and swept away
         │ fence asked, renamed, folder synced
         ▼
    name            whole

A disk that refuses is one RunError (refusals.py), and nothing half-written stays.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from potstill.fencing import Fence
from potstill.journal import fsync_folder
from potstill.refusals import refusals

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


@contextmanager
def placed(path: Path, fence: Fence) -> Iterator[Path]:
    """The name under which the block writes `path`, a file or a folder; it is in place and durable after the block.

    Raises Fenced when a newer attempt has begun, RunError when the disk is full or refuses, and what the block raises.
    """
    temporary = _beside(path)
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            fence.check()
            temporary.rename(path)
            fsync_folder(path.parent)
        finally:
            _remove(temporary)


def take_away(path: Path, *, unless: str | None = None) -> None:
    """Remove a file or folder that is in place: it is gone at once, never half there.

    A folder stays that holds a file named `unless`. Who writes that file, then sees the folder in its place, has it.
    """
    if unless is not None and (path / unless).exists():
        return
    doomed = _beside(path)
    path.rename(doomed)
    if unless is not None and (doomed / unless).exists():  # written since the first look
        doomed.rename(path)
        return
    _remove(doomed)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed in `folder`; only while nobody writes there."""
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            _remove(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _sync(path: Path) -> None:
    """Files before the folders that name them."""
    if not path.is_dir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return
    for inner in path.iterdir():
        _sync(inner)
    fsync_folder(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
