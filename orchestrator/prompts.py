"""The prompt stream: prompt i of a run, for ever the same. Resuming a run is starting from its cursor.

A run with another seed sees other prompts, and no prompt twice, but for those whose text is learnt again. Says in which
step a prompt is trained and, where a schedule decides it, whose text it gets. Refuses nothing and remembers nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from orchestrator.offpolicy import Kept, OffPolicy
from potstill.environments import Environment
from potstill.types import Prompt

_PER_SEED = 1 << 24  # prompts of one run before its stream would meet the next seed's


class PromptStream:
    def __init__(
        self, environment: Environment, *, seed: int, prompts_per_step: int, offpolicy: OffPolicy | None = None
    ) -> None:
        self._environment = environment
        self._first = seed * _PER_SEED
        self._prompts_per_step = prompts_per_step
        self._offpolicy = offpolicy

    def take(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts of these positions in the run's stream."""
        return [self._prompt(index) for index in indices]

    def _prompt(self, index: int) -> Prompt:
        before, place = divmod(index, self._prompts_per_step)
        step = before + 1
        text = "new" if self._offpolicy is None else self._offpolicy.text(step, place)
        if isinstance(text, Kept):
            kept = self._environment.train(text.prompt)
            # a prompt may come back while its first text is still on its way: an id is of a place in the run
            return dataclasses.replace(kept, id=f"{kept.id}@{index}", step=step, text=text.ids)
        prompt = self._environment.train(self._first + index)
        return dataclasses.replace(prompt, step=step, text="given" if text == "given" else None)
