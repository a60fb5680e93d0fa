"""Ids that somebody chose for a teacher to score: distinct at each position, as teachers want them. Pure.

Legend: T positions, N ids as they were chosen, perhaps repeated, W distinct ones that are asked, M wanted back.
"""

from __future__ import annotations

import numpy as np

from potstill.types import FloatArray, IntArray


def width_of(ids: IntArray) -> int:
    """The most distinct ids at a position of [T, N]."""
    return max(len(np.unique(row)) for row in ids)


def filled(ids: IntArray, width: int) -> IntArray:
    """[T, W] the distinct ids of each row of [T, N], then the lowest others: their mass is known too, and no tail
    counts it twice.

    >>> filled(np.array([[7, 0, 7], [1, 0, 2]], np.int32), 3).tolist()
    [[0, 7, 1], [0, 1, 2]]
    """
    rows = [np.unique(row) for row in ids]
    lowest = np.arange(width)
    return np.stack([np.concatenate([row, np.setdiff1d(lowest, row)])[:width] for row in rows]).astype(np.int32)


def among(ids: IntArray, logprobs: FloatArray, rest: FloatArray, wanted: IntArray) -> tuple[FloatArray, FloatArray]:
    """Log-probs [T, M] of the `wanted` among the ids [T, W], and the log of all other mass [T].

    logprobs [T, W] and rest [T], of what lies outside the ids, are a teacher's answer; all of `wanted` are in `ids`.
    """
    place = (ids[:, None, :] == wanted[:, :, None]).argmax(axis=2)
    others = logprobs.astype(np.float64)
    np.put_along_axis(others, place, -np.inf, axis=1)
    tail = np.logaddexp(np.logaddexp.reduce(others, axis=1), rest)
    return np.take_along_axis(logprobs, place, axis=1), tail.astype(np.float32)
