"""A version's tensors for processes that hold a student together: laid once into memory that each of them maps.

    the engine's process   lent(weights) ──► memory without a name ──► Lent: where it is, in a message
    vLLM's processes       Lent ◄── mapped; each takes its share of every tensor

The memory is the kernel's (memfd): it goes with the process that lent it, however that ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.transports import rows
from potstill.types import TensorEntry
from potstill.weights import laid_out


@dataclass(frozen=True, slots=True)
class Lent:
    """Weights (see arriving.py) that were checked before they were lent. Small to pickle; for this machine alone."""

    path: str
    table: tuple[TensorEntry, ...]

    def begin(self) -> None:
        """They are here."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        memory = self.memory()
        return ((entry.name, rows.tensor(memory, entry)) for entry in self.table)

    def end(self) -> None:
        """Whoever lent them takes them back."""

    def memory(self) -> Tensor:
        """uint8, mapped."""
        last = self.table[-1]
        return torch.from_file(self.path, shared=True, size=last.offset + rows.padded(last.nbytes), dtype=torch.uint8)


@contextmanager
def lent(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Lent]:
    """Copies; readers that have mapped them keep them for as long as they want."""
    tensors = dict(weights)
    table = laid_out((name, str(one.dtype).removeprefix("torch."), one.shape) for name, one in tensors.items())
    file = os.memfd_create("potstill-weights")
    try:
        found = Lent(f"/proc/{os.getpid()}/fd/{file}", table)
        memory = found.memory()
        for entry, tensor in zip(table, tensors.values(), strict=True):
            rows.tensor(memory, entry).copy_(tensor)
        yield found
    finally:
        os.close(file)
