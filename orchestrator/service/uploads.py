"""Files that clients upload: taken in piece by piece, read to their end, and put into place by one rename.

    .incoming-3f2a…   while it arrives and is read            left by a killed process: swept away
    file-ID           as it was sent
    file-ID.jsonl     what a run reads of it, where that is something else

A file is whole, sound and on disk before its row is there, and its row is gone before it is. What it is called by its
owner is kept in the row and never a path here. Refuses a file that is too large while it still arrives.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from orchestrator.service import parquet, prompt_files
from orchestrator.service.principals import Principal
from orchestrator.service.prompt_files import Purpose
from orchestrator.service.store.files import File, Files, Room, new_file_id
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.uses import is_file_id
from potstill.errors import ServiceError
from potstill.journal import fsync_folder

MAX_FILE_BYTES = 512 * 2**20
_INCOMING = ".incoming-"
_PARQUET = b"PAR1"
_FORGOTTEN_S = 86400.0  # an upload takes less


class Incoming:
    """A file that arrives: in a temporary place, counted and hashed as it is written."""

    def __init__(self, path: Path, file: BinaryIO, most: int, room: Room | None) -> None:
        self.path = path
        self._file = file
        self._most = most
        self._room = room
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        """Raises ServiceError (413, 429) before a byte too many is kept."""
        self.size += len(piece)
        if self.size > self._most:
            raise too_large(self._most)
        if self._room is not None:
            self._room.require(self.size)
        self._digest.update(piece)
        self._file.write(piece)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def settle(self) -> None:
        """All of it is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a client says of a file."""

    filename: str
    purpose: Purpose


class Uploads:
    """`folder` is the service's own, and nobody else writes there.

    A file that is larger than `max_bytes` is refused, and one of which nothing has come for `silence_s` is given up.
    """

    def __init__(self, folder: Path, files: Files, *, max_bytes: int = MAX_FILE_BYTES, silence_s: float = 60.0) -> None:
        self.folder = folder
        self._files = files
        self.max_bytes = max_bytes
        self.silence_s = silence_s

    @contextmanager
    def incoming(self, room: Room | None) -> Iterator[Incoming]:
        """A place for a file while it arrives; nothing of it is left after the block, unless it was kept.

        Without `room` its key's is looked at when all of it is here: it may be a file that is kept already.
        """
        path = self.folder / f"{_INCOMING}{uuid.uuid4().hex}"
        try:
            with path.open("xb") as file:
                path.chmod(0o600)
                yield Incoming(path, file, self.max_bytes, room)
        finally:
            path.unlink(missing_ok=True)
            _read_by_runs(path).unlink(missing_ok=True)

    def keep(self, incoming: Incoming, label: Label, who: Principal, once: Once) -> tuple[File, bool]:
        """Read it to its end and keep it; the flag tells that the same request had done so before.

        Raises ServiceError: 400 with the lines that are wrong, 422 for an Idempotency-Key of another request, 429 when
        its key may keep no more.
        """
        earlier = self._files.earlier(once)
        if earlier is not None:
            return earlier, True
        incoming.settle()
        file = self._read(incoming, label, who)
        place = self.folder / file.id
        converted = _read_by_runs(incoming.path)
        if converted.exists():
            with converted.open("rb") as made:
                os.fsync(made.fileno())
            converted.rename(_read_by_runs(place))
        incoming.path.rename(place)
        fsync_folder(self.folder)
        try:
            kept, replayed = self._files.add(file, once, who.limits)
        except ServiceError as error:
            if error.status != 503:  # of a database that is away nobody knows whether it has the row
                self._remove(file.id)
            raise
        if replayed:
            self._remove(file.id)
        return kept, replayed

    def read_by_runs(self, file: File) -> Path:
        """What a run reads of it."""
        converted = _read_by_runs(self.folder / file.id)
        return converted if converted.exists() else self.folder / file.id

    def content(self, file: File) -> Path:
        """As it was sent. Raises ServiceError (404) when it has just been deleted."""
        place = self.folder / file.id
        if not place.is_file():
            raise ServiceError("there is no such file", 404, "file_not_found")
        return place

    def delete(self, file_id: str, viewer: Principal) -> None:
        """Raises ServiceError: 404, or 409 while an unfinished run names it."""
        self._files.delete(file_id, viewer)
        self._remove(file_id)

    def sweep(self) -> None:
        """Remove what killed processes left: pieces that nobody writes any more, and files without a row."""
        for path in self.folder.iterdir():
            name = path.name.removesuffix(".jsonl")
            is_ours = name.startswith(_INCOMING) or is_file_id(name)
            try:
                is_old = time.time() - path.stat().st_mtime > _FORGOTTEN_S
            except FileNotFoundError:  # it has just been put into place, or deleted
                continue
            if is_ours and is_old and not (is_file_id(name) and self._files.exists(name)):
                path.unlink(missing_ok=True)

    def _read(self, incoming: Incoming, label: Label, who: Principal) -> File:
        beside = _read_by_runs(incoming.path)
        with incoming.path.open("rb") as file:
            is_parquet = file.read(len(_PARQUET)) == _PARQUET
        if is_parquet:
            summary, columns = self._of_parquet(incoming.path, label.purpose, beside)
        else:
            summary = prompt_files.read(incoming.path, label.purpose, beside=beside)
            columns = list(summary.columns)
        return File(
            id=new_file_id(incoming.sha256),
            owner=who.owner,
            key_id=who.key_id,
            filename=label.filename,
            purpose=label.purpose,
            format="parquet" if is_parquet else "jsonl",
            bytes=incoming.size,
            sha256=incoming.sha256,
            rows=summary.rows,
            columns=columns,
            created_at=time.time(),
        )

    def _of_parquet(self, path: Path, purpose: Purpose, beside: Path) -> tuple[prompt_files.Summary, list[str]]:
        """Its rows as lines, in `beside`, and what is to be said of them."""
        lines = path.with_name(f"{path.name}-lines")
        try:
            columns = parquet.to_json_lines(path, lines, most_rows=prompt_files.MOST_ROWS)
            summary = prompt_files.read(lines, purpose, beside=beside)
            if not beside.exists():
                lines.rename(beside)
        finally:
            lines.unlink(missing_ok=True)
        return summary, columns

    def _remove(self, file_id: str) -> None:
        _read_by_runs(self.folder / file_id).unlink(missing_ok=True)
        (self.folder / file_id).unlink(missing_ok=True)


def label_of(filename: str, purpose: str) -> Label:
    """Raises ServiceError (400) for a purpose that is not known, or a name that is none."""
    known: dict[str, Purpose] = {"prompts": "prompts", "eval": "eval", "fine-tune": "fine-tune"}
    if purpose not in known:
        raise ServiceError(f"purpose must be one of {', '.join(known)}", 400, "invalid_purpose")
    name = re.split(r"[/\\]", filename)[-1]
    if not 0 < len(name) <= 255 or any(unicodedata.category(character)[0] == "C" for character in name):
        raise ServiceError("a file name has 1 to 255 characters, all of them printable", 400, "invalid_filename")
    return Label(filename=name, purpose=known[purpose])


def too_large(most: int) -> ServiceError:
    return ServiceError(f"the file is larger than {most} bytes", 413, "file_too_large")


def _read_by_runs(path: Path) -> Path:
    return path.with_name(f"{path.name}.jsonl")
