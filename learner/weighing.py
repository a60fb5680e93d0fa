"""How much each model of a teacher counts: as the config says, or as it has proved on text that turned out right.

    loss of a model in a step   1 − exp(mean log-prob of the step's right tokens), one less their geometric mean
                                probability: multiplicative weights follow it (ensemble.py, Hedge)

Right is what a verifier gave full marks and, whatever it earned, a reference of the data. A step without right text
changes nothing. Each model reads the right text once more, without gradient, and alone.

A weighing learns after a step, for the next one. It asks no verifier and refuses the state of other models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from learner.ensemble import Hedge
from learner.inner_teacher import InnerTeacher
from learner.nearness import Reading
from potstill.config import RunConfig
from potstill.config_teachers import LocalTeacher
from potstill.errors import ConfigError
from potstill.types import BoolArray, ScoredRollout


class Weighing(Protocol):
    """What a trainer asks."""

    def learn(self, batch: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> dict[str, float]:
        """From a whole step, once; masks [T] of trained tokens. Returns what is worth watching, by metric's name."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises ConfigError when it is another run's."""


class Given:
    """The weights of the config, or no models to weigh. Learns nothing."""

    def learn(self, batch: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ConfigError(
                "the checkpoint has learned weights of teachers, this run has none; continue with its own"
            )


class Learned:
    """The weights of a teacher's members, by name, which begin as they are.

    readings    what each member alone says of text, in the teacher's order
    references  whether text that the student did not write is the data's, and right
    """

    def __init__(
        self, teacher: InnerTeacher, readings: Mapping[str, Reading], *, rate: float, references: bool
    ) -> None:
        self._teacher = teacher
        self._readings = dict(readings)
        self._references = references
        self._hedge = Hedge(list(readings), rate=rate)
        given = dict(zip(readings, teacher.weights, strict=True))
        self._hedge.load({name: math.log(weight) for name, weight in given.items()})
        self._weigh()

    def learn(self, batch: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> dict[str, float]:
        """The metrics are the weights that the step was learnt with."""
        used = {f"teacher_weight_{name}": weight for name, weight in self._hedge.weights().items()}
        pairs = zip(batch, masks, strict=True)
        right = [(scored, mask) for scored, mask in pairs if mask.any() and self._is_right(scored)]
        if right:
            texts, kept = [scored for scored, _ in right], [mask for _, mask in right]
            self._hedge.update({name: _loss(one.logprobs(texts, kept)) for name, one in self._readings.items()})
            self._weigh()
        return used

    def state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(score, dtype=torch.float64) for name, score in self._hedge.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self._readings.keys():
            raise ConfigError(
                f"the checkpoint has learned weights of teachers {sorted(state)}, this run of "
                f"{sorted(self._readings)}; continue with the config that wrote it"
            )
        self._hedge.load({name: score.item() for name, score in state.items()})
        self._weigh()

    def _weigh(self) -> None:
        self._teacher.weigh(list(self._hedge.weights().values()))

    def _is_right(self, scored: ScoredRollout) -> bool:
        return scored.rollout.reward >= 1 or (self._references and scored.rollout.origin == "others")


def weighing_of(teacher: InnerTeacher | None, config: RunConfig, device: torch.device) -> Weighing:
    """The run's. `device`: of the teacher's logits."""
    local = config.teacher
    if teacher is None or not isinstance(local, LocalTeacher) or local.learn_weights is None:
        return Given()
    alone = [Reading(member, config.learner, device) for member in teacher.apart()]
    readings = dict(zip(names_of([one.model for one in local.models]), alone, strict=True))
    return Learned(teacher, readings, rate=local.learn_weights, references=config.rollout.references_alone)


def names_of(folders: Sequence[str]) -> list[str]:
    """The folders' own names; their places where two are called the same.

    >>> names_of(["models/maths", "models/code"]), names_of(["maths/last", "code/last"])
    (['maths', 'code'], ['0', '1'])
    """
    names = [Path(folder).name for folder in folders]
    return names if len(set(names)) == len(names) else [str(place) for place in range(len(names))]


def _loss(logprobs: Sequence[Tensor]) -> float:
    """In [0, 1], of log-probs [T_i] of texts."""
    return -math.expm1(torch.cat(list(logprobs)).double().mean().item())
