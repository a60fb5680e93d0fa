"""One optimizer step: the same numbers every time, and none at all when one of them is not finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from learner.model import CausalModel, recompute_layers
from learner.packing import Packed
from learner.trainer import Trainer
from potstill.errors import NonFinite
from potstill.types import ScoredRollout
from tests.rollouts import random_batch
from tests.trainers import (
    SELF_TEACHER,
    VOCABULARY,
    loss_and_gradient,
    make_config,
    make_network,
    make_trainer,
    same,
    take_step,
    weights_of,
)

LENGTHS = [(3, 4), (1, 6), (5, 2)]
METHODS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd", "objective": {"support": {"k": 3}}},
    "opd_sampled": {"method": "opd_sampled"},
    "gkd_topk": {"method": "gkd_topk", "objective": {"support": {"k": 3}}},
    "opsd": {"method": "opsd", "teacher": SELF_TEACHER},
    "sft": {"method": "sft"},
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def some_batch(*, seed: int = 1, by: str = "student") -> list[ScoredRollout]:
    return random_batch(LENGTHS, vocabulary=VOCABULARY, seed=seed, by=by)


def batch_for(method: dict[str, Any], *, seed: int = 1) -> list[ScoredRollout]:
    return some_batch(seed=seed, by="others" if method["method"] == "sft" else "student")


def spoilt(batch: Sequence[ScoredRollout], field: str, value: float) -> list[ScoredRollout]:
    """The batch with one number of its first rollout's scores replaced, which none of the checks on tokens sees."""
    first, *others = batch
    numbers = np.array(getattr(first.scores, field))
    numbers[(0,) * numbers.ndim] = value
    scores = dataclasses.replace(first.scores, **{field: numbers})
    return [ScoredRollout(rollout=first.rollout, scores=scores), *others]


def in_float32(batch: Sequence[ScoredRollout]) -> list[ScoredRollout]:
    """As the wire and the engines deliver it."""

    def cast(carrier: Any) -> Any:
        values = {field.name: getattr(carrier, field.name) for field in dataclasses.fields(carrier)}
        wide = {n: v for n, v in values.items() if isinstance(v, np.ndarray) and v.dtype == np.float64}
        return dataclasses.replace(carrier, **{name: value.astype(np.float32) for name, value in wide.items()})

    return [ScoredRollout(rollout=cast(scored.rollout), scores=cast(scored.scores)) for scored in batch]


def saved_bytes(trainer: Trainer, batch: Sequence[ScoredRollout]) -> int:
    """What a step's passes keep for their backward passes, in all."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss_and_gradient(trainer, batch)
    return kept


@every_method
def test_layers_that_are_computed_again_give_the_same_gradient_from_less_memory(method: dict[str, Any]) -> None:
    plain, frugal = make_trainer(**method), make_trainer(**method)
    recompute_layers(frugal.student)
    expected, found = (loss_and_gradient(trainer, batch_for(method)) for trainer in (plain, frugal))
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert saved_bytes(frugal, batch_for(method)) < 0.5 * saved_bytes(plain, batch_for(method))


@every_method
def test_float32_weights_and_scores_give_the_float64_gradient_to_rounding(method: dict[str, Any]) -> None:
    network = make_network().float()
    trainer = Trainer(make_config(**method), CausalModel(network, network))
    loss, gradient = loss_and_gradient(trainer, in_float32(batch_for(method)))
    expected_loss, expected = loss_and_gradient(make_trainer(**method), batch_for(method))
    assert gradient.dtype == torch.float32
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


@every_method
def test_the_same_batches_give_the_same_weights_bit_for_bit(method: dict[str, Any]) -> None:
    def trained() -> dict[str, torch.Tensor]:
        trainer = make_trainer(**method)
        for step in (1, 2, 3):
            take_step(trainer, batch_for(method, seed=step), step)
        return weights_of(trainer.student)

    assert same(trained(), trained())


@every_method
def test_steps_on_one_batch_bring_its_loss_down(method: dict[str, Any]) -> None:
    trainer = make_trainer(**method, optim={"lr": 0.01})
    losses = [take_step(trainer, batch_for(method), step).metrics["loss"] for step in range(1, 11)]
    assert losses[-1] < losses[0] - 0.01


def test_a_report_says_what_the_step_did() -> None:
    trainer = make_trainer(objective={"support": {"k": 3}}, optim={"lr": 0.2, "warmup_steps": 10}, steps=20)
    loss, gradient = loss_and_gradient(trainer, some_batch())
    report = take_step(trainer, some_batch(), 3)
    assert report.step == trainer.version == 3
    assert report.metrics["loss"] == loss
    assert report.metrics["reverse_kl"] == pytest.approx(loss, rel=1e-6)
    assert report.metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-9)
    assert report.metrics["lr"] == pytest.approx(0.06)
    assert 0 < report.metrics["captured_mass"] < 1
    assert 0 < report.metrics["entropy"] < math.log(VOCABULARY)
    assert report.seconds["train"] > 0


def test_metrics_do_not_depend_on_micro_batches() -> None:
    one, many = (
        take_step(
            make_trainer(objective={"support": {"k": 3}}, learner={"micro_batch_tokens": size}), some_batch(), 1
        ).metrics
        for size in (1000, 8)
    )
    assert one == pytest.approx(many, rel=1e-9)


def test_the_gradient_is_clipped_to_its_greatest_norm_and_reported_as_it_was() -> None:
    trainer = make_trainer(objective={"support": {"k": 3}}, optim={"max_grad_norm": 1e-3})
    report = take_step(trainer, some_batch(), 1)
    clipped = torch.cat([p.grad.flatten() for p in trainer.student.parameters()]).norm().item()
    assert report.metrics["grad_norm"] > 0.01
    assert clipped == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("opd", "ids_logprobs", math.nan),
        ("opd", "ids_logprobs", -math.inf),
        ("opd", "ids_tail", math.nan),
        ("gkd_topk", "topk_logprobs", math.nan),
    ],
)
def test_a_score_that_is_not_finite_stops_the_step_and_moves_nothing(method: str, field: str, value: float) -> None:
    trainer, untouched = make_trainer(**METHODS[method]), make_trainer(**METHODS[method])
    with pytest.raises(NonFinite):
        take_step(trainer, spoilt(some_batch(), field, value), 1)
    assert same(weights_of(trainer.student), weights_of(untouched.student))
    assert trainer.version == 0
    for either in (trainer, untouched):
        take_step(either, some_batch(), 1)
    assert same(weights_of(trainer.student), weights_of(untouched.student))


@every_method
def test_a_student_that_went_nan_stops_the_step_and_moves_nothing(method: dict[str, Any]) -> None:
    trainer = make_trainer(**method)
    with torch.no_grad():
        trainer.student.head[0, 0] = math.nan
    before = weights_of(trainer.student)
    with pytest.raises(NonFinite, match="'main'"):
        take_step(trainer, batch_for(method), 1)
    after = weights_of(trainer.student)
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)
    assert not trainer.optimizer.state


def test_both_views_of_a_micro_batch_fit_into_its_tokens() -> None:
    """The teacher's prompt is longer than the student's, and both are in memory together."""
    lengths: list[int] = []

    def record(_: torch.nn.Module, inputs: tuple[Packed]) -> None:
        lengths.append(len(inputs[0].input_ids))

    trainer = make_trainer(
        method="opsd", teacher={**SELF_TEACHER, "weights": "live"}, learner={"micro_batch_tokens": 10}
    )
    trainer.student.register_forward_pre_hook(record)
    loss_and_gradient(trainer, random_batch([(3, 3), (3, 3), (2, 3)], vocabulary=VOCABULARY, seed=1))
    assert max(lengths) <= 10
    assert (
        len(lengths) == 6
    )  # three micro-batches of two views: two students' views would have fitted, not the teachers'


def test_a_micro_batch_without_a_loss_token_is_not_computed() -> None:
    calls: list[int] = []
    masks = [[True] * 4, [False] * 6]
    batch = random_batch([(3, 4), (1, 6)], vocabulary=VOCABULARY, seed=1, masks=masks)
    trainer = make_trainer(objective={"support": {"k": 3}}, learner={"micro_batch_tokens": 6})
    trainer.student.register_forward_pre_hook(lambda *_: calls.append(1))
    take_step(trainer, batch, 1)
    assert len(calls) == 1


def test_the_divergence_from_each_of_several_teachers_is_measured_by_name() -> None:
    trainer = make_trainer(method="opd_sampled", teacher=None)
    batch = random_batch([(3, 4), (2, 5), (1, 3)], vocabulary=VOCABULARY, seed=3)
    renamed = [
        ScoredRollout(
            rollout=one.rollout,
            scores=dataclasses.replace(one.scores, identity=dataclasses.replace(one.scores.identity, name=name)),
        )
        for one, name in zip(batch, ("maths", "code", "maths"), strict=True)
    ]
    alone = take_step(trainer, batch, 1).metrics
    assert not any(name.startswith("reverse_kl_of_") for name in alone)
    trainer = make_trainer(method="opd_sampled", teacher=None)
    metrics = take_step(trainer, renamed, 1).metrics
    assert metrics["reverse_kl"] == pytest.approx(
        (7 * metrics["reverse_kl_of_maths"] + 5 * metrics["reverse_kl_of_code"]) / 12
    )
    assert metrics["reverse_kl_of_maths"] != pytest.approx(metrics["reverse_kl_of_code"])
