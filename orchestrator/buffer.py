"""The one home of the staleness rule: what may be generated now, and what makes a batch. Pure asyncio.

Symbols: V the version the learner has published, S max_staleness, B prompts per step. Optimizer step s (from 1) trains
the prompts (s−1)·B … s·B − 1, and makes version s.

Rule: prompt i may be started when it belongs to a step ≤ V + 1 + S, that is when i < (V + 1 + S)·B.

A rollout of step s is therefore written by version s − 1 − S or later, so that when it is trained it is at most S
versions old; nothing ever has to be thrown away. With S = 0 the next batch starts when the new weights are out:
synchronous training is this buffer with S = 0. A batch holds its prompts in their order, whatever order they came in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from potstill.errors import RunError, SignalLost
from potstill.types import Receipt, StepBatch


class Buffer:
    """Grants prompt indices to producers and gives batches to the one consumer."""

    def __init__(
        self, *, prompts_per_step: int, steps: int, max_staleness: int, max_unscored_fraction: float, version: int
    ) -> None:
        self._prompts_per_step = prompts_per_step
        self._last_prompt = steps * prompts_per_step
        self._max_staleness = max_staleness
        self._max_unscored_fraction = max_unscored_fraction
        self._version = version
        self._next_prompt = version * prompts_per_step
        self._first_untaken = self._next_prompt
        self._groups: dict[int, Sequence[Receipt]] = {}
        self._changed = asyncio.Condition()

    @property
    def num_waiting(self) -> int:
        """Prompts scored and not yet trained on."""
        return len(self._groups)

    async def grant(self, at_most: int) -> range | None:
        """Wait until a prompt may be started; returns up to `at_most` indices, or None when there are no more."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._next_prompt < self._limit or self._exhausted)
            if self._exhausted:
                return None
            granted = range(self._next_prompt, min(self._next_prompt + at_most, self._limit))
            self._next_prompt = granted.stop
            return granted

    async def put(self, prompt_index: int, receipts: Sequence[Receipt]) -> None:
        """Hand in all completions of one prompt. Raises RunError when they break the rule."""
        oldest = prompt_index // self._prompts_per_step - self._max_staleness
        if any(0 <= receipt.oldest_version < oldest for receipt in receipts):
            raise RunError(f"a rollout of prompt {prompt_index} is older than version {oldest}")
        async with self._changed:
            if prompt_index >= self._next_prompt:
                raise RunError(f"prompt {prompt_index} was never granted")
            if prompt_index in self._groups or prompt_index < self._first_untaken:
                raise RunError(f"prompt {prompt_index} was handed in twice")
            self._groups[prompt_index] = receipts
            self._changed.notify_all()

    async def batch(self, step: int) -> StepBatch:
        """Wait for every prompt of `step`. Raises SignalLost when too few of its tokens could be scored."""
        wanted = range((step - 1) * self._prompts_per_step, step * self._prompts_per_step)
        async with self._changed:
            await self._changed.wait_for(lambda: all(index in self._groups for index in wanted))
            receipts = tuple(receipt for index in wanted for receipt in self._groups.pop(index))
            self._first_untaken = wanted.stop
        loss_tokens = sum(receipt.num_loss_tokens for receipt in receipts)
        unscored = sum(receipt.num_unscored_tokens for receipt in receipts)
        if unscored > self._max_unscored_fraction * loss_tokens or unscored == loss_tokens:
            raise SignalLost(
                f"step {step}: {unscored} of {loss_tokens} loss tokens have no teacher's score; "
                f"loop.max_unscored_fraction allows {self._max_unscored_fraction:.0%}"
            )
        return StepBatch(
            step=step,
            receipts=receipts,
            num_loss_tokens=loss_tokens - unscored,
            num_sequences=sum(receipt.num_loss_tokens > receipt.num_unscored_tokens for receipt in receipts),
        )

    async def advance(self, version: int) -> None:
        """The learner's weights of `version` are out: more prompts may be started."""
        async with self._changed:
            self._version = version
            self._changed.notify_all()

    @property
    def _limit(self) -> int:
        return min(self._last_prompt, (self._version + 1 + self._max_staleness) * self._prompts_per_step)

    @property
    def _exhausted(self) -> bool:
        return self._next_prompt >= self._last_prompt
