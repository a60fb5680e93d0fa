"""Where a download lands: beside its place, which it takes at the end, when all of it has been verified.

    .NAME.partial/      resumed by the next download of the same name
         │ every file has its size and sha256; synced
         ▼
    NAME/               whole

Refuses names that would leave the folder, a file that is longer than it should be, and to overwrite what is there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from potstill.client.resources import CheckpointFile
from potstill.client.steps import Reply
from potstill.errors import ConfigError, ServiceError
from potstill.journal import fsync_folder

_BLOCK = 1 << 20


def check_free(place: Path) -> None:
    """Raises ConfigError for a place that is taken."""
    if place.exists() or place.is_symlink():
        raise ConfigError(f"{place} exists: name a place that is free")


def partial(place: Path) -> Path:
    """Beside a place, under a name that the next download of it finds again."""
    return place.with_name(f".{place.name}.partial")


def files_below(folder: Path, files: Iterable[CheckpointFile]) -> dict[str, Part]:
    """Where each file goes. Raises ServiceError (unsafe_name) for a name that is not one of a file in `folder`."""
    parts: dict[str, Part] = {}
    for file in sorted(files, key=lambda file: file["name"]):  # a before a/b, which cannot both be
        name = file["name"]
        pure = PurePosixPath(name)
        inside = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == name
        odd = not name.isprintable() or "\\" in name or PureWindowsPath(name).drive != ""
        if not inside or odd or name in parts or any(str(parent) in parts for parent in pure.parents):
            raise ServiceError("the checkpoint names a file that would leave its folder", None, "unsafe_name")
        parts[name] = Part(path=folder / name, size=file["bytes"], sha256=file["sha256"])
    return parts


def prepare(folder: Path, parts: Iterable[Part]) -> None:
    """Make the folder, or clear the one that an earlier download has left of all that does not belong to this one."""
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link, which no download has left: remove it")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {part.path for part in parts}
    for found in sorted(folder.rglob("*"), reverse=True):
        if found.is_symlink() or not (found.is_dir() or found in wanted):
            found.unlink()
        elif found.is_dir() and not any(found in path.parents for path in wanted):
            found.rmdir()


@dataclass(slots=True)
class Part:
    """One file on its way. A sink: bytes go to its end, or begin it anew when the service sends the whole."""

    path: Path
    size: int
    sha256: str
    have: int = 0
    _file: IO[bytes] | None = field(default=None, repr=False)
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256, repr=False)

    def find(self) -> None:
        """Take up what an earlier download has left."""
        self.have, self._hash = 0, hashlib.sha256()
        if self.size == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
        if not self.path.is_file() or self.path.stat().st_size > self.size:
            return
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                self._hash.update(block)
                self.have += len(block)

    @property
    def whole(self) -> bool:
        """Whether every byte is there, right or wrong."""
        return self.have == self.size

    @property
    def right(self) -> bool:
        return self.whole and self._hash.hexdigest() == self.sha256

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.find()

    def begin(self, reply: Reply) -> bool:
        begins_at = {200: 0, 206: self.have}.get(reply.status)
        if begins_at is None or (reply.status == 206 and not _starts(reply, self.have)):
            return False
        if begins_at == 0:
            self.have, self._hash = 0, hashlib.sha256()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab" if begins_at else "wb")
        return True

    def write(self, chunk: bytes) -> None:
        assert self._file is not None
        if self.have + len(chunk) > self.size:
            raise ServiceError(f"{self.path.name} is longer than the service said", None, "damaged_download")
        self._file.write(chunk)
        self._hash.update(chunk)
        self.have += len(chunk)

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def take_place(temporary: Path, place: Path) -> None:
    """The rename that makes it visible, and durable."""
    check_free(place)
    for folder in (path for path in (temporary, *temporary.rglob("*")) if path.is_dir()):
        fsync_folder(folder)
    temporary.rename(place)
    fsync_folder(place.parent)


def _starts(reply: Reply, offset: int) -> bool:
    return reply.headers.get("content-range", "").startswith(f"bytes {offset}-")
