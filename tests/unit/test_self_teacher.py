"""The student's own weights as its teacher: aligned on the completion, and moving only as it is told to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.model import load_student
from learner.packing import Packed, pack
from learner.trainer import Trainer
from potstill.types import ScoredRollout
from tests.rollouts import random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import (
    PLAIN,
    SELF_TEACHER,
    VOCABULARY,
    loss_and_gradient,
    make_config,
    make_network,
    make_trainer,
    plain_logits,
    same,
    take_step,
    weights_of,
)

LENGTHS = [(3, 4), (1, 6), (5, 2)]


def some_batch(*, seed: int = 1) -> list[ScoredRollout]:
    """Rollouts whose teacher's context is two tokens longer than the prompt."""
    return random_batch(LENGTHS, vocabulary=VOCABULARY, seed=seed)


def with_same_context(batch: Sequence[ScoredRollout]) -> list[ScoredRollout]:
    return [
        ScoredRollout(rollout=dataclasses.replace(s.rollout, teacher_context_ids=s.rollout.prompt_ids), scores=None)
        for s in batch
    ]


def self_taught(weights: str, **teacher: object) -> Trainer:
    return make_trainer(
        method="opsd",
        objective={"divergence": "reverse_kl", "pointwise_clip": None},
        teacher={**SELF_TEACHER, "weights": weights, **teacher},
        optim={"lr": 0.02},
    )


def view(batch: Sequence[ScoredRollout]) -> Packed:
    """The teacher's view of the batch."""
    rollouts = [scored.rollout for scored in batch]
    return pack(
        [r.teacher_context_ids for r in rollouts], [r.completion_ids for r in rollouts], [r.loss_mask for r in rollouts]
    )


def teacher_logits(trainer: Trainer, batch: Sequence[ScoredRollout]) -> Tensor:
    return trainer.teacher.hidden(view(batch)) @ trainer.teacher.head.T


def lerp(old: Mapping[str, Tensor], new: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    return {name: decay * old[name] + (1 - decay) * new[name] for name in old}


@pytest.mark.parametrize("weights", ["frozen", "ema", "live"])
def test_the_teacher_reads_its_own_context_and_is_aligned_on_the_completion(weights: str) -> None:
    batch, plain = some_batch(), make_network(attention=PLAIN)
    expected = [
        plain_logits(plain, scored.rollout.teacher_context_ids, scored.rollout.completion_ids) for scored in batch
    ]
    torch.testing.assert_close(teacher_logits(self_taught(weights), batch), torch.cat(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("weights", ["frozen", "ema", "live"])
def test_with_the_students_own_context_loss_and_gradient_are_zero(weights: str) -> None:
    loss, gradient = loss_and_gradient(self_taught(weights), with_same_context(some_batch()))
    assert abs(loss) < 1e-14
    assert gradient.abs().max() < 1e-13


def test_with_a_privileged_context_there_is_something_to_learn() -> None:
    loss, gradient = loss_and_gradient(self_taught("frozen"), some_batch())
    assert loss > 0.01
    assert gradient.abs().max() > 1e-3


def test_a_frozen_teacher_does_not_move() -> None:
    trainer, batch = self_taught("frozen"), some_batch()
    before, state = teacher_logits(trainer, batch), trainer.teacher.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for step in (1, 2, 3):
        take_step(trainer, batch, step)
    assert torch.equal(teacher_logits(trainer, batch), before)
    assert same(trainer.teacher.state(), kept)


def test_an_ema_teacher_is_the_average_of_the_students_with_geometric_weights() -> None:
    decay, trainer, batch = 0.7, self_taught("ema", ema_decay=0.7), some_batch()
    expected = weights_of(trainer.student.network)
    students = []
    for step in (1, 2, 3, 4):
        take_step(trainer, batch, step)
        students.append(weights_of(trainer.student.network))
    n = len(students)
    for name in expected:
        powers = [(1 - decay) * decay ** (n - 1 - i) for i in range(n)]
        moving = sum(power * student[name] for power, student in zip(powers, students, strict=True))
        torch.testing.assert_close(trainer.teacher.state()[name], decay**n * expected[name] + moving)


def test_a_live_teacher_is_the_student_after_every_step() -> None:
    trainer, batch = self_taught("live"), some_batch()
    first = teacher_logits(trainer, batch)
    take_step(trainer, batch, 1)
    expected = (trainer.student(view(batch)) @ trainer.student.head.T).detach()
    assert torch.equal(teacher_logits(trainer, batch), expected)
    assert not torch.equal(first, expected)


def test_no_gradient_reaches_a_live_teacher() -> None:
    """∂ of the loss is that with the teacher's logits held as constants."""
    live, frozen = (loss_and_gradient(self_taught(weights), some_batch())[1] for weights in ("live", "frozen"))
    assert torch.equal(live, frozen)


@pytest.mark.parametrize(("weights", "kept"), [("frozen", True), ("ema", True), ("live", False)])
def test_state_is_kept_only_where_the_student_does_not_say_it_all(weights: str, kept: bool) -> None:
    assert bool(self_taught(weights).teacher.state()) == kept


def test_a_loaded_state_is_the_teacher_it_came_from() -> None:
    batch, one, other = some_batch(), self_taught("ema"), self_taught("ema")
    for step in (1, 2):
        take_step(one, batch, step)
    other.teacher.load(one.teacher.state())
    assert torch.equal(teacher_logits(one, batch), teacher_logits(other, batch))


@pytest.mark.parametrize("weights", ["frozen", "ema"])
def test_the_teacher_of_a_student_with_tied_embeddings_does_not_share_its_memory(weights: str) -> None:
    trainer = make_trainer(tie=True, method="opsd", teacher={**SELF_TEACHER, "weights": weights})
    own = {p.data_ptr() for p in trainer.teacher.state().values()}
    assert len(own) == len(weights_of(trainer.student.network))
    assert own.isdisjoint(p.data_ptr() for p in trainer.student.parameters())


def test_the_frozen_teacher_of_an_adapter_is_the_base_model_and_costs_no_copy(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", seed=0, layers=1)
    config = make_config(
        method="opsd",
        teacher=SELF_TEACHER,
        student={"model": str(folder), "lora": {"rank": 4, "alpha": 8.0}},
        optim={"lr": 0.05},
    )
    student = load_student(config.student, seed=0, device=torch.device("cpu"))
    trainer, batch = Trainer(config, student), some_batch()
    before = teacher_logits(trainer, batch)
    for step in (1, 2):
        take_step(trainer, batch, step)
    assert trainer.teacher.state() == {}
    assert torch.equal(teacher_logits(trainer, batch), before)
    adapted = (trainer.student(view(batch)) @ trainer.student.head.T).detach()
    assert (adapted - before).abs().max() > 1e-2
    assert all(p.requires_grad for name, p in student.network.named_parameters() if ".lora_" in name)
