"""Weights in the memory of one host: segments in /dev/shm that take turns, written once and read by every worker there.

    /dev/shm/potstill-weights-<random>/    locked for the owner's life: whoever can lock it may sweep it away
        1    [ version | payload ]         locked by each who reads it, in common
        2    [ version | payload ]         locked by the owner alone, while version n+1 is written over n-1

Locks are the kernel's (flock): they end with the process that holds them, however it ends. A segment that somebody
still reads is never written over; a slow reader costs a third segment until it is done. Segments are used again and
again because their first touch costs ten times a copy, and readers keep their mappings for the same reason.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.errors import StaleWeights, WeightsError
from potstill.transports import Kept
from potstill.weights import Bytes

ROOT = Path("/dev/shm")  # noqa: S108
PREFIX = "potstill-weights-"
HEADER = mmap.PAGESIZE  # of a segment; its first 8 bytes are the version, -1 while it is being written


@dataclass(frozen=True, slots=True)
class SharedMemoryPayload:
    """The segment at `path`, for as long as it holds `version`."""

    path: str
    nbytes: int
    version: int

    def open(self, kept: Kept) -> Bytes:
        _forget_removed(kept)
        lease = self._lease()
        try:
            mapping = kept.get(self.path)
            if mapping is None or len(mapping) < HEADER + self.nbytes:  # segments grow with what they hold
                mapping = kept[self.path] = mmap.mmap(lease, 0, prot=mmap.PROT_READ)
            found = int(np.frombuffer(mapping, np.int64, 1)[0])
            if found != self.version:
                raise StaleWeights(f"weights version {self.version}: {found} lies there now; ask for the newest")
            payload = np.frombuffer(mapping, np.uint8, self.nbytes, HEADER)
        except BaseException:
            _release(lease)
            raise
        weakref.finalize(payload, _release, lease).atexit = False  # views refer to it, so it outlives all of them
        return payload

    def _lease(self) -> int:
        """A descriptor with a lock that keeps the owner from writing here."""
        try:
            lease = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise StaleWeights(f"weights version {self.version}: its segment is gone; ask for the newest") from None
        try:
            fcntl.flock(lease, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lease)
            raise StaleWeights(f"weights version {self.version}: a newer one is being written over it") from None
        return lease


class SharedMemory:
    """The owner's side."""

    def __init__(self, root: Path = ROOT) -> None:
        sweep(root)
        folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
        self._owned: int | None = os.open(folder, os.O_RDONLY)
        fcntl.flock(self._owned, fcntl.LOCK_EX)
        self._folder = folder.rename(root / folder.name.removeprefix("."))  # seen by sweepers only once it is locked
        self._segments: list[_Segment] = []  # oldest first; the last one holds the newest version
        self._writing: _Segment | None = None
        self._made = 0

    def room(self, nbytes: int) -> Bytes:
        self._writing = self._writing or self._free()
        return self._writing.begin(nbytes)

    def send(self, payload: Bytes, version: int) -> SharedMemoryPayload:
        assert self._writing is not None, "send follows room"
        segment, self._writing = self._writing, None
        segment.finish(version)
        self._segments.append(segment)
        return SharedMemoryPayload(str(segment.path), payload.size, version)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        for segment in [*self._segments, *([self._writing] if self._writing else [])]:
            segment.close()
        self._segments, self._writing = [], None
        if self._owned is not None:
            os.close(self._owned)
            self._owned = None

    def _free(self) -> _Segment:
        """The oldest segment that nobody reads and that is not the newest; the other idle ones are removed."""
        idle = [segment for segment in self._segments[:-1] if segment.lock()]
        self._segments = [segment for segment in self._segments if segment not in idle]
        for segment in idle[1:]:
            segment.path.unlink()
            segment.close()
        if idle:
            return idle[0]
        self._made += 1
        return _Segment(self._folder / str(self._made))


class _Segment:
    """One file, mapped for as long as its owner lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._mapping: mmap.mmap | None = None
        self.lock()

    def lock(self) -> bool:
        """For the owner alone; False while somebody reads."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def begin(self, nbytes: int) -> Bytes:
        if self._mapping is None or len(self._mapping) < HEADER + nbytes:
            try:
                os.posix_fallocate(self._descriptor, 0, HEADER + nbytes)  # a full /dev/shm is an error here, not SIGBUS
            except OSError as error:
                raise WeightsError(
                    f"{self.path.parent.parent} has no room for {nbytes >> 20} MiB of weights ({error.strerror}): "
                    'make it larger (docker run --shm-size), or set weights.transport = "object_store"'
                ) from error
            self._mapping = mmap.mmap(self._descriptor, HEADER + nbytes)
        self._version()[0] = -1
        return np.frombuffer(self._mapping, np.uint8, nbytes, HEADER)

    def finish(self, version: int) -> None:
        self._version()[0] = version
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        self._mapping = None  # unmapped once no array refers to it
        os.close(self._descriptor)

    def _version(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        assert self._mapping is not None
        return np.frombuffer(self._mapping, np.int64, 1)


def sweep(root: Path = ROOT) -> None:
    """Remove what owners left who ended without closing. Folders of living owners and of other users stay."""
    for folder in root.glob(f"{PREFIX}*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _release(lease: int) -> None:
    fcntl.flock(lease, fcntl.LOCK_UN)  # closing alone would not: the mapping holds a duplicate of the descriptor
    os.close(lease)


def _forget_removed(kept: Kept) -> None:
    """Unmap segments that their owner has removed; their memory is free once nobody maps it."""
    for path in [key for key, mapping in kept.items() if isinstance(mapping, mmap.mmap) and not os.path.exists(key)]:
        del kept[path]
