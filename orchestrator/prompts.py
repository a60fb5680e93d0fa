"""The prompt stream: prompt i of a run, for ever the same. Resuming a run is starting from its cursor.

A run with another seed sees other prompts, and no prompt twice. Refuses nothing and remembers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from potstill.environments import Environment
from potstill.types import Prompt

_PER_SEED = 1 << 24  # prompts of one run before its stream would meet the next seed's


class PromptStream:
    def __init__(self, environment: Environment, *, seed: int) -> None:
        self._environment = environment
        self._first = seed * _PER_SEED

    def take(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts of these positions in the run's stream."""
        return [self._environment.train(self._first + index) for index in indices]
