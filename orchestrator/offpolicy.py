"""Where a step's text comes from: new, replayed or given (DistiLLM, arXiv 2402.03898, §3.2). Only decides.

φ, the share of steps on the student's own text, starts at 0 and rises by 1/N when the validation loss has risen. Within
that share new text becomes rarer as the run goes on, and the last texts, first in first out, are used again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal


class OffPolicy:
    """Items are whatever names a text and is plain JSON. The draws depend on seed and step alone."""

    def __init__(self, *, steps: int, seed: int, rises: int = 10, tolerance: float = 0.1, capacity: int = 1000) -> None:
        self._steps, self._seed = steps, seed
        self._rises, self._tolerance = rises, tolerance  # N: from 0 to 1; ε in nats
        self._num_rises = 0
        self._validation: float | None = None
        self._kept: deque[Any] = deque(maxlen=capacity)

    @property
    def share(self) -> float:
        """φ"""
        return min(1.0, self._num_rises / self._rises)

    def source(self, step: int) -> Literal["new", "replayed", "given"]:
        """Of step `step`, from 1: new when u < φ(1 − t/T), replayed when u < φ, given otherwise; t = step − 1.

        New text is added to the buffer and the step trains on a draw from it. While the buffer is empty there is
        nothing to replay, and text is new; the official code also prefers new text until the buffer is full.
        """
        u = self._random(step, "source").random()
        if u >= self.share:
            return "given"
        return "new" if u < self.share * (1 - (step - 1) / self._steps) or not self._kept else "replayed"

    def add(self, item: Any) -> None:
        """Remember a text; the oldest is forgotten when the buffer is full."""
        self._kept.append(item)

    def draw(self, step: int, count: int) -> list[Any]:
        """`count` different texts. Raises ValueError when there are fewer."""
        return self._random(step, "draw").sample(list(self._kept), count)

    def validated(self, loss: float) -> None:
        """After a validation, in nats a token."""
        if self._validation is not None and loss > self._validation + self._tolerance:
            self._num_rises += 1
        self._validation = loss

    def state(self) -> dict[str, Any]:
        return {"num_rises": self._num_rises, "validation": self._validation, "kept": list(self._kept)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self._num_rises, self._validation = state["num_rises"], state["validation"]
        self._kept = deque(state["kept"], maxlen=self._kept.maxlen)

    def _random(self, step: int, purpose: str) -> random.Random:
        return random.Random(f"{self._seed}/{step}/{purpose}")
