"""Rewards from an order: what a teacher that can only compare answers says of each. Pure.

Refuses an order that does not name every answer exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence


def from_ranking(order: Sequence[int]) -> list[float]:
    """Rewards in [0, 1] of n ≥ 2 answers: the best earns 1, the worst 0, each place between the same step less.

    order  indices of the answers, best first. Raises ValueError when it is no order of 0 … n − 1, or of one answer,
           which is as good as any

    >>> from_ranking([2, 0, 1])
    [0.5, 0.0, 1.0]
    """
    if len(order) < 2 or sorted(order) != list(range(len(order))):
        raise ValueError(f"a ranking names each of two or more answers once, best first, not {list(order)}")
    last = len(order) - 1
    places = {answer: place for place, answer in enumerate(order)}
    return [1 - places[answer] / last for answer in range(len(order))]
