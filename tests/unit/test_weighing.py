"""Learned weights of teachers against products written out, over text that was right, wrong, given or not judged."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.inner_teacher import InnerTeacher, Member
from learner.model import load_student
from learner.nearness import Reading
from learner.packing import Packed
from learner.trainer import Trainer
from learner.weighing import Given, Learned, names_of
from potstill.config import LearnerConfig
from potstill.errors import ConfigError
from potstill.types import ScoredRollout
from tests.rollouts import make_rollout, random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import VOCABULARY, make_config, take_step

TEXTS = ([3, 4, 5], [6, 7], [8])
LIKING = {"good": 3.0, "bad": -2.0}
"""Logit of each of the six tokens of these texts; the others have 0."""


def unigrams(likings: Tensor, *, weight: float = 1.0) -> Member:
    """A model that says the same wherever it is: logits [V]."""

    def see(packed: Packed) -> tuple[Tensor, Tensor]:
        return torch.ones(len(packed.predicts), 1, dtype=torch.float64), likings[:, None]

    return Member(see=see, weight=weight)


def member(liking: float, weight: float = 1.0) -> Member:
    likings = torch.zeros(VOCABULARY, dtype=torch.float64)
    likings[3:9] = liking
    return unigrams(likings, weight=weight)


def probability(liking: float) -> float:
    """Of any token of the texts."""
    return math.exp(liking) / (6 * math.exp(liking) + VOCABULARY - 6)


def learned(
    teacher: InnerTeacher, *, names: Sequence[str] = tuple(LIKING), rate: float = 1.0, references: bool = False
) -> Learned:
    """Whose forward passes hold one text each."""
    alone = [
        Reading(one, LearnerConfig(micro_batch_tokens=4, chunk_tokens=2), torch.device("cpu"))
        for one in teacher.apart()
    ]
    return Learned(teacher, dict(zip(names, alone, strict=True)), rate=rate, references=references)


def good_and_bad(combine: str = "logits", weights: tuple[float, float] = (1.0, 1.0)) -> InnerTeacher:
    members = [member(liking, weight) for liking, weight in zip(LIKING.values(), weights, strict=True)]
    return InnerTeacher(members, combine=combine)


def step_of(*rewards: float, by: str = "student") -> list[ScoredRollout]:
    """A text for each reward, written by the student or by others."""
    version = 0 if by == "student" else -1
    rollouts = [
        make_rollout(id=f"p{i}/0", completion=text, versions=[version] * len(text))
        for i, (text, _) in enumerate(zip(TEXTS, rewards, strict=False))
    ]
    return [
        ScoredRollout(rollout=dataclasses.replace(rollout, reward=reward), scores=None)
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]


def learn(weighing: Learned, batch: list[ScoredRollout]) -> dict[str, float]:
    return weighing.learn(batch, [scored.rollout.loss_mask for scored in batch])


def test_weights_are_products_of_a_factor_a_step_that_begin_as_given() -> None:
    teacher = good_and_bad(weights=(1.0, 3.0))
    weighing = learned(teacher, rate=0.7)
    for step in range(5):
        factors = [
            weight * math.exp(-0.7 * step * (1 - probability(liking)))
            for weight, liking in zip((1.0, 3.0), LIKING.values(), strict=True)
        ]
        expected = [factor / sum(factors) for factor in factors]
        assert teacher.weights == pytest.approx(expected, rel=1e-12)
        assert list(learn(weighing, step_of(1.0, 0.0, 1.0)).values()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_the_weight_of_whoever_knows_right_text_grows_towards_1_and_the_teacher_becomes_it(combine: str) -> None:
    teacher = good_and_bad(combine)
    weighing, batch = learned(teacher, rate=4.0), step_of(1.0, 0.0, 1.0)
    everywhere = [scored.rollout.loss_mask for scored in batch]
    rows = torch.arange(sum(len(text) for text in TEXTS))
    shares = [learn(weighing, batch)["teacher_weight_good"] for _ in range(40)]
    assert shares[0] == pytest.approx(0.5)
    assert all(one < next_ for one, next_ in itertools.pairwise(shares))
    assert shares[-1] > 1 - 1e-6
    one, both = (reader.read(batch, everywhere)(rows).softmax(-1) for reader in (teacher.apart()[0], teacher))
    torch.testing.assert_close(both, one, rtol=0, atol=1e-5)


def test_the_mean_is_over_the_trained_tokens_of_all_right_texts() -> None:
    """A model that likes some tokens more than others: its geometric mean, in a loop."""
    likings = torch.linspace(-1, 2, VOCABULARY, dtype=torch.float64)
    teacher = InnerTeacher([unigrams(likings), member(0.0)])
    batch = step_of(1.0, 0.5, 1.0)
    masks = [scored.rollout.loss_mask.copy() for scored in batch]
    masks[0][1] = False
    learned(teacher, rate=2.0).learn(batch, masks)
    p = likings.softmax(-1).tolist()
    product = math.prod(p[token] for token in (TEXTS[0][0], TEXTS[0][2], TEXTS[2][0]))
    factors = [math.exp(-2.0 * (1 - product ** (1 / 3))), math.exp(-2.0 * (1 - probability(0.0)))]
    assert teacher.weights == pytest.approx([factor / sum(factors) for factor in factors], rel=1e-12)


@pytest.mark.parametrize("rewards", [(0.0, 0.99, 0.0), (math.nan, math.nan, math.nan)])
def test_a_step_without_right_text_leaves_the_weights_and_reports_them(rewards: tuple[float, ...]) -> None:
    teacher = good_and_bad()
    weighing = learned(teacher, references=True)
    learn(weighing, step_of(1.0))
    before, state = teacher.weights, weighing.state()
    shown = learn(weighing, step_of(*rewards))
    assert teacher.weights == before == tuple(shown.values())
    assert weighing.state() == state


def test_right_text_of_which_nothing_is_trained_leaves_the_weights() -> None:
    teacher = good_and_bad()
    weighing, batch = learned(teacher), step_of(1.0)
    before = teacher.weights
    weighing.learn(batch, [~batch[0].rollout.loss_mask])
    assert teacher.weights == before


@pytest.mark.parametrize("reward", [0.0, math.nan])
def test_text_of_others_is_right_by_its_reward_or_because_it_is_the_datas(reward: float) -> None:
    def share(references: bool, earned: float) -> float:
        teacher = good_and_bad()
        learn(learned(teacher, references=references), step_of(earned, by="others"))
        return teacher.weights[0]

    assert share(False, reward) == pytest.approx(0.5)
    assert share(True, reward) == share(False, 1.0) > 0.53


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    teachers = [good_and_bad(), good_and_bad(weights=(5.0, 1.0))]
    one, other = (learned(teacher, rate=0.3) for teacher in teachers)
    for _ in range(3):
        learn(one, step_of(1.0, 1.0))
    other.load(dict(reversed(one.state().items())))
    assert teachers[0].weights == teachers[1].weights
    assert learn(one, step_of(1.0)) == learn(other, step_of(1.0))
    assert teachers[0].weights == teachers[1].weights


def test_the_state_of_other_teachers_or_of_another_kind_of_run_is_refused() -> None:
    state = learned(good_and_bad()).state()
    with pytest.raises(ConfigError, match=r"weights of teachers \['bad', 'good'\], this run of \['bad', 'other'\]"):
        learned(good_and_bad(), names=("other", "bad")).load(state)
    with pytest.raises(ConfigError, match=r"of teachers \[\], this run of"):
        learned(good_and_bad()).load({})
    with pytest.raises(ConfigError, match="this run has none"):
        Given().load(state)
    Given().load({})


def test_models_are_called_by_their_folders_and_by_their_places_where_those_are_equal() -> None:
    assert names_of(["models/maths/", "code"]) == ["maths", "code"]
    assert names_of(["maths/last", "code/last", "law"]) == ["0", "1", "2"]


# In a run.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("models")
    return [save_tiny_model(parent / name, seed=seed, layers=1) for seed, name in enumerate(["student", "a", "b"])]


def trainer_of(folders: Sequence[Path], **teacher: Any) -> Trainer:
    models = [{"model": str(folder), "weight": weight} for folder, weight in zip(folders[1:], (1.0, 3.0), strict=True)]
    config = make_config(
        method="multi_teacher",
        student={"model": str(folders[0])},
        teacher={"kind": "local", "models": models, **teacher},
    )
    return Trainer(config, load_student(config.student, seed=0, device=torch.device("cpu")))


def right_batch(*, seed: int) -> list[ScoredRollout]:
    batch = random_batch([(3, 4), (1, 6), (5, 2)], vocabulary=VOCABULARY, seed=seed)
    return [dataclasses.replace(s, rollout=dataclasses.replace(s.rollout, reward=1.0)) for s in batch]


def logits_of(trainer: Trainer, batch: Sequence[ScoredRollout]) -> Tensor:
    assert trainer.teacher is not None
    masks = trainer.masks(batch)
    return trainer.teacher.read(batch, masks)(torch.arange(sum(int(mask.sum()) for mask in masks)))


def test_a_step_learns_with_the_weights_that_the_step_before_left(folders: list[Path]) -> None:
    trainer, given = trainer_of(folders, learn_weights=50.0), trainer_of(folders)
    batch = right_batch(seed=1)
    first, plain = take_step(trainer, batch, 1), take_step(given, batch, 1)
    assert first.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-6)
    assert (first.metrics["teacher_weight_a"], first.metrics["teacher_weight_b"]) == pytest.approx((0.25, 0.75))
    second, plain = take_step(trainer, batch, 2), take_step(given, batch, 2)
    assert second.metrics["teacher_weight_a"] != pytest.approx(0.25, rel=1e-3)
    assert second.metrics["teacher_weight_a"] + second.metrics["teacher_weight_b"] == pytest.approx(1)
    assert second.metrics["loss"] != pytest.approx(plain.metrics["loss"], rel=1e-6)


def test_without_a_rate_the_weights_stay_as_given_bit_for_bit(folders: list[Path]) -> None:
    trainer, batch = trainer_of(folders), right_batch(seed=1)
    before = logits_of(trainer, batch)
    for step in (1, 2):
        metrics = take_step(trainer, batch, step).metrics
        assert not [name for name in metrics if name.startswith("teacher_weight_")]
    assert trainer.inner.teacher is not None
    assert trainer.inner.teacher.weights == (1.0, 3.0)
    assert torch.equal(logits_of(trainer, batch), before)
    assert trainer.weighing.state() == {}
