"""Weights as files in a folder that learner and workers share: for hosts between which nothing faster is possible.

A file has its name only when it is whole and on the disk. Older ones are removed as newer ones come; whoever has one
open keeps it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.errors import StaleWeights, WeightsError
from potstill.transports import Kept
from potstill.weights import Bytes

KEEP = 2  # the newest version, and the one before for those who are just reading it


@dataclass(frozen=True, slots=True)
class FilePayload:
    """The whole of a file."""

    path: str

    def open(self, kept: Kept) -> Bytes:
        try:
            return np.asarray(np.memmap(self.path, np.uint8, mode="r"))
        except FileNotFoundError:
            raise StaleWeights(f"{self.path} is gone; ask for the newest version") from None


class Disk:
    """The learner's side; `folder` is made when it is not there."""

    def __init__(self, folder: Path, *, keep: int = KEEP) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._keep = keep
        self._sent: list[Path] = []
        self._buffer: Bytes = np.empty(0, np.uint8)
        for left in folder.glob("*.weights*"):  # by a learner that ended without closing
            left.unlink(missing_ok=True)

    def room(self, nbytes: int) -> Bytes:
        if self._buffer.size < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]

    def send(self, payload: Bytes, version: int) -> FilePayload:
        path = self._folder / f"{len(self._sent):06d}-{version}.weights"
        try:
            with open(path.with_suffix(".weights.part"), "wb") as file:
                file.write(payload.data)
                file.flush()
                os.fsync(file.fileno())
            path.with_suffix(".weights.part").rename(path)
        except OSError as error:
            raise WeightsError(f"weights version {version} cannot be written to {path.parent}: {error}") from error
        self._sent.append(path)
        for old in self._sent[: -self._keep]:
            old.unlink(missing_ok=True)
        return FilePayload(str(path))

    def close(self) -> None:
        for path in self._sent:
            path.unlink(missing_ok=True)
        self._buffer = np.empty(0, np.uint8)
