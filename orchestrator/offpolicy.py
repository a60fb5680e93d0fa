"""Where a step's text comes from: new, replayed or given (DistiLLM, arXiv 2402.03898, §3.2). Only decides. Pure.

φ, the share of steps on the student's own text, starts at 0 and rises by 1/N when the loss of held-out text has risen.
Within that share new text becomes rarer as the run goes on, and the last texts, first in first out, are used again.

Generation runs ahead, so a decision must not depend on who was faster. Step s + 2 + S, S being max_staleness, is
decided when step s and its chores are done, by what was known then: a rise that is heard after step s, or a text that
it made, counts from step s + 2 + S on. Steps up to s + 1 + S may have been granted already, and s + 2 + S cannot be
before s + 1 is trained (buffer.py). The first 2 + S steps are decided before the run, when φ is 0.

A kept text is the index of its prompt and its ids: plain JSON, which a checkpoint holds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from potstill.config import AdaptiveConfig, RunConfig


class Kept(NamedTuple):
    """A text of the student's. Example: Kept(prompt=7, ids=(50, 49, 2))"""

    prompt: int  # its index in the environment
    ids: tuple[int, ...]


class OffPolicy:
    """One run's schedule. Its random numbers depend on seed and step alone."""

    def __init__(
        self, config: AdaptiveConfig, *, steps: int, prompts_per_step: int, max_staleness: int, seed: int
    ) -> None:
        self.config, self._steps, self._seed = config, steps, seed
        self._prompts_per_step = prompts_per_step
        self._ahead = 2 + max_staleness
        self._num_rises = 0
        self._validation: float | None = None
        self._kept: deque[Kept] = deque(maxlen=config.capacity)
        self._decided: dict[int, Literal["new", "given"] | tuple[Kept, ...]] = {}
        for step in range(1, self._ahead + 1):
            self._decide(step)

    @classmethod
    def of(cls, config: RunConfig) -> OffPolicy | None:
        """The run's, where its config has one."""
        if config.rollout.adaptive is None:
            return None
        return cls(
            config.rollout.adaptive,
            steps=config.loop.steps,
            prompts_per_step=config.rollout.prompts_per_step,
            max_staleness=config.loop.max_staleness,
            seed=config.seed,
        )

    @property
    def share(self) -> float:
        """φ"""
        return min(1.0, self._num_rises / self.config.rises)

    def text(self, step: int, place: int) -> Literal["new", "given"] | Kept:
        """Of the prompt at `place`, from 0, in step `step`, from 1: the student writes, the data gives, or this."""
        decided = self._decided[step]
        return decided if isinstance(decided, str) else decided[place]

    def validated(self, loss: float) -> None:
        """After a validation; the first one, before the run, is only remembered. `loss` is in nats a token."""
        if self._validation is not None and loss > self._validation + self.config.tolerance:
            self._num_rises += 1
        self._validation = loss

    def trained(self, step: int, written: Sequence[Kept]) -> None:
        """Step `step` is done, and validated where that was due: keep what the student wrote for it, decide ahead."""
        self._kept.extend(written)
        self._decided = {later: decided for later, decided in self._decided.items() if later > step}
        self._decide(step + self._ahead)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as plain JSON."""
        return {
            "num_rises": self._num_rises,
            "validation": self._validation,
            "kept": list(self._kept),
            "decided": list(self._decided.items()),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave, also after JSON made lists of its tuples."""
        self._num_rises, self._validation = state["num_rises"], state["validation"]
        self._kept = deque(_texts(state["kept"]), maxlen=self.config.capacity)
        self._decided = {
            step: _texts(decided) if isinstance(decided, list | tuple) else decided
            for step, decided in state["decided"]
        }

    def _decide(self, step: int) -> None:
        """New when u < φ(1 − t/T), replayed when u < φ, given otherwise; t = step − 1.

        While fewer texts are kept than a step has prompts, text is new in place of replayed. The official code also
        prefers new text until the buffer is full. There, too, a step trains on the new text that it made.
        """
        u = self._random(step, "source").random()
        if u >= self.share:
            self._decided[step] = "given"
        elif u < self.share * (1 - (step - 1) / self._steps) or len(self._kept) < self._prompts_per_step:
            self._decided[step] = "new"
        else:
            self._decided[step] = tuple(self._random(step, "draw").sample(list(self._kept), self._prompts_per_step))

    def _random(self, step: int, purpose: str) -> random.Random:
        return random.Random(f"{self._seed}/{step}/{purpose}")


def _texts(plain: Sequence[Any]) -> tuple[Kept, ...]:
    return tuple(Kept(prompt=prompt, ids=tuple(ids)) for prompt, ids in plain)
