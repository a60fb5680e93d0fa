"""Who says what the completions of a step are worth: whoever judged them when they were written, or a model in here.

A judge is asked what a step's completions earned, then learns from them. It knows neither objective nor schedule;
learner/credit.py makes advantages of what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from learner.model import CausalModel
from potstill.algebra.judges import Discriminator
from potstill.config import RunConfig
from potstill.errors import ConfigError
from potstill.types import ScoredRollout


class Judge(Protocol):
    """What a trainer asks."""

    def rewards(self, batch: Sequence[ScoredRollout]) -> list[float]:
        """One for each completion; NaN where it was not judged."""

    def learn(self, batch: Sequence[ScoredRollout]) -> dict[str, float]:
        """From a whole step, once. Returns what is worth watching, by metric's name."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises ConfigError when it is another run's."""


class Verifier:
    """The rewards that the rollouts came with. Learns nothing."""

    def rewards(self, batch: Sequence[ScoredRollout]) -> list[float]:
        return [scored.rollout.reward for scored in batch]

    def learn(self, batch: Sequence[ScoredRollout]) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ConfigError("the checkpoint has a discriminator, this run has none; continue with its own config")


def judge_of(student: CausalModel, config: RunConfig) -> Judge:
    """The objective's. Made before the first step: a discriminator begins as the student that the run found."""
    if not isinstance(config.objective.judge, Discriminator):
        return Verifier()
    from learner import discriminator

    return discriminator.Discriminator(student, config, config.objective.judge)
