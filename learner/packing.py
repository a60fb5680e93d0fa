"""Sequences of any lengths, end to end in one row: no token of padding enters a linear layer. Pure.

Legend: N packed tokens, M loss tokens, S sequences. A sequence is its context and its completion without the last
token, which predicts nothing. The hidden state of packed row r predicts the token after it, so the completion's token
t is predicted at row (start of the sequence) + (context length) + t − 1. The two views of one completion (the
student's prompt, a teacher's privileged one) differ in these rows and agree in the order of their loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.types import BoolArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One row of sequences. Example: contexts [7, 8] and [9], completions [1, 2] and [3, 4, 5], all loss tokens:

    input_ids    [7, 8, 1 | 9, 3, 4]
    position_ids [0, 1, 2 | 0, 1, 2]
    lengths      [3, 3]
    predicts     [1, 2, 3, 4, 5]      packed rows whose hidden states predict 1, 2 | 3, 4, 5
    """

    input_ids: Tensor  # [N] i64
    position_ids: Tensor  # [N] i64
    lengths: tuple[int, ...]  # [S]
    predicts: Tensor  # [M] i64


def pack(contexts: Sequence[IntArray], completions: Sequence[IntArray], loss_masks: Sequence[BoolArray]) -> Packed:
    """Lay the sequences end to end. Raises ValueError when a context or a completion is empty."""
    inputs, positions, predicts, lengths = [], [], [], []
    start = 0
    for context, completion, mask in zip(contexts, completions, loss_masks, strict=True):
        if len(context) == 0 or len(completion) == 0:
            raise ValueError("a packed sequence needs at least one context token and one completion token")
        length = len(context) + len(completion) - 1
        inputs += [context, completion[:-1]]
        positions.append(np.arange(length))
        predicts.append(start + len(context) - 1 + np.flatnonzero(mask))
        lengths.append(length)
        start += length
    return Packed(
        input_ids=torch.from_numpy(np.concatenate(inputs).astype(np.int64)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        lengths=tuple(lengths),
        predicts=torch.from_numpy(np.concatenate(predicts)),
    )


def share(lengths: Sequence[int], *, num_ranks: int) -> list[list[int]]:
    """[R] indices of sequences, ascending, of each rank: the longest first, each to whoever has fewest tokens.

    Deterministic, and the same on every rank. Where there are fewer sequences than ranks some have none.

    >>> share([5, 2, 4, 1], num_ranks=2)
    [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    held = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(num_ranks), key=lambda r: held[r])
        shares[rank].append(index)
        held[rank] += lengths[index]
    return [sorted(indices) for indices in shares]


def plan_micro_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices of sequences per micro-batch: best fit of the longest first, each at most max_tokens tokens.

    Deterministic, and the same on every rank. A sequence longer than max_tokens has a micro-batch of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b, free in enumerate(room) if free >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
        else:
            best = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[best].append(index)
        room[best] -= lengths[index]
    return bins
