"""What carries rows of bytes from the learner's device to one worker's.

    gloo    a broadcast in a group of these two, over TCP       where one of them has no GPU
    nccl    the same, over NVLink, PCIe or the network          between two GPUs
    ipc     nothing: the worker maps the learner's memory       on one GPU, where NCCL cannot have two members

Groups of two: nobody waits for a third, and a worker that is lost is nobody else's loss. They are beside torch's
default group and never touch it. The learner gives, the worker takes, the same rows in the same order. Waiting here
has no end of its own but gloo's: who waits too long, or hears that the other is gone, drops the link from outside.
NCCL and CUDA IPC have not been run on a GPU yet; see docs/weights.md.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

Kind = Literal["gloo", "nccl", "ipc"]
GIVER, TAKER = 0, 1
NEVER = timedelta(days=365)  # torch ends the process of an NCCL group that waits for longer
_TYPES, _PLAIN = slice(0, 7), slice(7, None)  # of reduce_tensor's arguments: what we know ourselves, and what travels


class Link(Protocol):
    kind: Kind

    def give(self, row: Tensor) -> None:
        """Returns when the row may be written again, or, over NCCL, once its sending is enqueued."""
        ...

    def take(self, start: int, stop: int) -> Tensor:
        """The next row, which is the payload's bytes from `start` to `stop`, whole."""
        ...

    def drop(self) -> None:
        """Never waits. Whoever is giving or taking is freed, or fails."""
        ...


def here() -> torch.device:
    """Where this process keeps a model."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def name_of(device: torch.device) -> str:
    """The same in every process that uses it: a GPU's UUID, or "cpu" for any CPU."""
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


class Pair:
    """A gloo or NCCL group of two."""

    def __init__(
        self,
        kind: Literal["gloo", "nccl"],
        store: Store,
        rank: int,
        *,
        device: torch.device,
        address: str,
        limit_s: float,
    ) -> None:
        """Returns when the other has called it as well. Raises RuntimeError where the two cannot meet.

        store    of this pair alone
        device   of this process; gloo goes through the memory of its CPU
        address  of this process, as the other reaches it
        limit_s  of the meeting, and of each row over gloo
        """
        self.kind: Kind = kind
        self._device = torch.device("cpu") if kind == "gloo" else device
        self._stream = _beside_what_is_computed(self._device)
        self._group: ProcessGroup | None = ProcessGroup(store, rank, 2)
        backend = _gloo(store, rank, address, limit_s) if kind == "gloo" else _nccl(store, rank)
        named = ProcessGroup.BackendType.GLOO if kind == "gloo" else ProcessGroup.BackendType.NCCL
        self._group._set_default_backend(named)
        self._group._register_backend(torch.device(self._device.type), named, backend)
        self._broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device))  # connects; the first takes seconds

    def give(self, row: Tensor) -> None:
        self._broadcast(row.to(self._device))

    def take(self, start: int, stop: int) -> Tensor:
        with torch.cuda.stream(self._stream):
            row = torch.empty(stop - start, dtype=torch.uint8, device=self._device)
        self._broadcast(row)
        if self._stream is not None:
            self._stream.synchronize()
        return row

    def drop(self) -> None:
        group, self._group = self._group, None
        if group is not None and self.kind == "nccl":  # may wait for the device: never in the caller's thread
            threading.Thread(target=group.abort, name="abort", daemon=True).start()

    def _broadcast(self, row: Tensor) -> None:
        if self._group is None:
            raise RuntimeError("the link was dropped")
        with torch.cuda.stream(self._stream):
            self._group.broadcast(row, GIVER).wait()


class Shown:
    """The giver's end of CUDA IPC: a room that the taker maps once, for as long as the line between them holds."""

    kind: Kind = "ipc"

    def __init__(self, room: Tensor) -> None:
        _, arguments = reduce_tensor(room)  # type: ignore[no-untyped-call]
        self.handle = [part.hex() if isinstance(part, bytes) else part for part in arguments[_PLAIN]]

    def give(self, row: Tensor) -> None:
        """It lies there already: its checksum, which was read, waited for it."""

    def take(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError("the learner gives")

    def drop(self) -> None:
        """The taker lets go of it."""


class Mapped:
    """The taker's end of CUDA IPC."""

    kind: Kind = "ipc"

    def __init__(self, handle: list[Any], nbytes: int, device: torch.device) -> None:
        """handle: as `Shown` has it. Raises RuntimeError where the two processes may not share memory."""
        types = (Tensor, (nbytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index)
        plain = [bytes.fromhex(part) if isinstance(part, str) else part for part in handle]
        self._room: Tensor | None = rebuild_cuda_tensor(*types, *plain)  # type: ignore[no-untyped-call]

    def give(self, row: Tensor) -> None:
        raise NotImplementedError("the worker takes")

    def take(self, start: int, stop: int) -> Tensor:
        if self._room is None:
            raise RuntimeError("the link was dropped")
        return self._room[start:stop]

    def drop(self) -> None:
        self._room = None


def part_of(store: Store, number: int) -> PrefixStore:
    """The part of a store that one pair meets in."""
    return PrefixStore(f"link-{number}", store)


def store_at(host: str, port: int, number: int) -> PrefixStore:
    """`part_of` the store of another process. Raises RuntimeError where there is none."""
    return part_of(TCPStore(host, port, is_master=False), number)


def _beside_what_is_computed(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _gloo(store: Store, rank: int, address: str, limit_s: float) -> ProcessGroupGloo:
    """Over the interface that the line is over: the one of the host's name may be loopback."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=limit_s)
    return ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Store, rank: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = NEVER
    return dist.ProcessGroupNCCL(store, rank, 2, options)
