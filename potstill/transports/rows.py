"""Tensors as rows of bytes in one flat room on a device, and checksums of them that are computed where they lie.

With links.py the only file of the shared package that imports torch. Both sides of a transfer between devices import
it: xxh3 needs the bytes on a CPU, these sums do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from potstill.types import TensorEntry
from potstill.weights import ALIGNMENT

BLOCK = 1 << 20  # words that are multiplied at a time: they and their factors stay in a GPU's cache
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2⁶⁴ over the golden ratio, as a signed word: its multiples lie far apart


def padded(nbytes: int) -> int:
    """Up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def row(room: Tensor, entry: TensorEntry, start: int = 0) -> Tensor:
    """uint8 [padded(nbytes)]: a tensor and the gap after it, in a room whose first byte is the payload's `start`-th."""
    return room[entry.offset - start : entry.offset - start + padded(entry.nbytes)]


def tensor(room: Tensor, entry: TensorEntry, start: int = 0) -> Tensor:
    """The tensor itself; nothing is copied."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return row(room, entry, start)[: entry.nbytes].view(dtype).view(entry.shape)


def sums(rows: Sequence[Tensor]) -> list[int]:
    """Of each row, Σᵢ wᵢ·xᵢ mod 2⁶⁴ over its 64-bit words x, with fixed odd factors w; twice over for a long one.

    Since factors are odd, a change of any one word always shows. They differ from place to place, so that words which
    changed places show as well. It finds damage and mistakes, not malice.
    rows  uint8 [a multiple of 8], all on one device, each starting at a multiple of 8 bytes
    """
    if not rows:
        return []
    found = torch.stack([_sum(one.view(torch.int64)) for one in rows])
    return [word % (1 << 64) for word in found.tolist()]


def _sum(words: Tensor) -> Tensor:
    factors = _factors(words.device)
    blocks = [(block * factors[: len(block)]).sum() for block in torch.split(words, BLOCK)]
    return (torch.stack(blocks) * factors[: len(blocks)]).sum()


@lru_cache(maxsize=4)
def _factors(device: torch.device) -> Tensor:
    return (torch.arange(BLOCK, device=device) * GOLDEN) | 1
