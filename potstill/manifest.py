"""What a checkpoint's folder says of its files: whether each is there and is the one that was written.

Knows files and hashes, and nothing of what is in them. Never repairs: it says what is wrong first.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError
from potstill.journal import checkpoints

MANIFEST = "manifest.json"


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises ConfigError on the first that differs."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{folder} is not a checkpoint: it has no readable manifest.json") from None
    for name, expected in files.items():
        try:
            found = _facts(folder / name)
        except FileNotFoundError:
            raise ConfigError(f"checkpoint {folder}: {name} is missing") from None
        except OSError as error:
            raise ConfigError(f"checkpoint {folder}: {name} cannot be read: {error.strerror}") from error
        if found != expected:
            raise ConfigError(f"checkpoint {folder}: {name} is damaged")


def newest_good(parent: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is sound, and what is wrong with each that is newer; None when none is sound."""
    damaged: list[str] = []
    for folder in reversed(checkpoints(parent)):
        flaw = flaw_in(folder)
        if flaw is None:
            return folder, damaged
        damaged.append(flaw)
    return None, damaged


def digest(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file but the manifest, by its path in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): _facts(p) for p in files}


def flaw_in(folder: Path) -> str | None:
    """Why a checkpoint cannot be restored from; None: it can."""
    try:
        verify(folder)
    except ConfigError as error:
        return str(error)
    return None


def _facts(path: Path) -> dict[str, Any]:
    """Of the file on the disk, not of the copy that the system may still have in memory."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # Linux; elsewhere the copy is read
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": os.fstat(file.fileno()).st_size}
