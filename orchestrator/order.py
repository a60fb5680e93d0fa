"""In which order prompts are trained: the two answers to what may be started and what makes a batch. Pure.

Symbols: B prompts per step, S max_staleness; step s is made by the learner at version s − 1.

    InOrder      step s trains the prompts (s − 1)·B … s·B − 1, whenever they are finished. Reproducible; one long
                 answer holds its step up.
    AsFinished   step s trains the first B prompts that are finished. More are written at once than steps need.

Both start nothing that could only be too old when its turn comes: a worker with version v writes for steps ≤ v + 1 + S.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from potstill.config import LoopConfig


class Order(Protocol):
    def may_start(self, chunk: range, *, worker: int, taken: int, started: int) -> bool:
        """Whether a worker with weights `worker` may begin these prompts.

        taken    the newest step that is made or being made: what is begun now is for a later one
        started  prompts begun by anyone, and in no step
        """
        ...

    def choose(self, step: int, ready: Collection[int]) -> Sequence[int] | None:
        """The prompts of a step, when enough are ready."""
        ...


@dataclass(frozen=True, slots=True)
class InOrder:
    prompts_per_step: int
    max_staleness: int

    def may_start(self, chunk: range, *, worker: int, taken: int, started: int) -> bool:
        return chunk.stop <= (worker + 1 + self.max_staleness) * self.prompts_per_step

    def choose(self, step: int, ready: Collection[int]) -> Sequence[int] | None:
        wanted = range((step - 1) * self.prompts_per_step, step * self.prompts_per_step)
        return wanted if len(ready) >= len(wanted) and all(map(ready.__contains__, wanted)) else None


@dataclass(frozen=True, slots=True)
class AsFinished:
    prompts_per_step: int
    max_staleness: int
    oversample: float

    def may_start(self, chunk: range, *, worker: int, taken: int, started: int) -> bool:
        room = math.ceil((1 + self.max_staleness + self.oversample) * self.prompts_per_step)
        return worker >= taken - self.max_staleness and started + len(chunk) <= room

    def choose(self, step: int, ready: Collection[int]) -> Sequence[int] | None:
        return sorted(ready)[: self.prompts_per_step] if len(ready) >= self.prompts_per_step else None


def order_of(loop: LoopConfig, prompts_per_step: int) -> Order:
    if loop.order == "prompt":
        return InOrder(prompts_per_step, loop.max_staleness)
    return AsFinished(prompts_per_step, loop.max_staleness, loop.oversample)
