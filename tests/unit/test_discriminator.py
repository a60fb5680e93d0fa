"""A discriminator by small steps: what it says, what it learns from, what it leaves alone, and that it resumes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import learner.judge
from learner import checkpoint
from learner.discriminator import Discriminator
from learner.judge import Verifier
from learner.model import load_student
from learner.trainer import Trainer
from potstill.errors import AlignmentError, ConfigError, NonFinite
from potstill.types import ScoredRollout
from tests.presets import Batch, assert_same, changed, computed, make_batch, trainer_of
from tests.rollouts import random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import VOCABULARY, make_config, make_trainer, same, take_step, weights_of

HEAD = "discriminator_head"
LORA = {"lora": {"rank": 2, "alpha": 4.0}}
CPU = torch.device("cpu")


def make_judge(*, lr: float = 1e-2, tie: bool = False, **config: Any) -> Discriminator:
    objective = {"judge": {"lr": lr, "max_grad_norm": 1e6}}
    judge = make_trainer(method="gad", objective=objective, teacher={"kind": "none"}, tie=tie, **config).judge
    assert isinstance(judge, Discriminator)
    return judge


def swapped(batch: Batch) -> Batch:
    """The student's text for that of others, and the other way round."""
    return [changed(s, weight_versions=-1 - s.rollout.weight_versions) for s in batch]


def with_head(judge: Discriminator, value: float) -> Discriminator:
    with torch.no_grad():
        judge.weights[HEAD].fill_(value)
    return judge


def test_equal_scores_cost_log_2_and_tell_nobody_apart() -> None:
    found = with_head(make_judge(), 0.0).learn(make_batch())
    assert found["discriminator_loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert (found["discriminator_accuracy"], found["reward_student"], found["reward_others"]) == (0.0, 0.0, 0.0)


def test_the_gradient_turns_round_when_the_authors_are_swapped_at_equal_scores() -> None:
    batch, gradients = make_batch(own=1), []
    for part in (batch, swapped(batch)):
        judge = with_head(make_judge(), 0.0)
        judge.learn(part)
        gradients.append(judge.weights[HEAD].grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], -gradients[1])


def test_what_is_measured_is_of_the_scores_before_it_learns() -> None:
    judge, batch = make_judge(), make_batch()
    scores = judge.rewards(batch)
    found = judge.learn(batch)
    others = {s.rollout.prompt_id: d for s, d in zip(batch, scores, strict=True) if s.rollout.origin == "others"}
    own = [(s.rollout.prompt_id, d) for s, d in zip(batch, scores, strict=True) if s.rollout.origin == "student"]
    losses = [math.log1p(math.exp(d - others[prompt])) for prompt, d in own]
    assert found["discriminator_loss"] == pytest.approx(sum(losses) / len(own), rel=1e-12)
    assert found["discriminator_accuracy"] == sum(others[prompt] > d for prompt, d in own) / len(own)
    assert found["reward_student"] == pytest.approx(sum(d for _, d in own) / len(own))
    assert found["reward_others"] == pytest.approx(sum(others.values()) / len(others))
    assert judge.learn(batch)["discriminator_loss"] < found["discriminator_loss"]


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_neither_a_score_nor_a_lesson_depends_on_what_it_is_packed_with(size: int) -> None:
    batch = make_batch()
    whole, other = make_judge(learner={"micro_batch_tokens": 1000}), make_judge(learner={"micro_batch_tokens": size})
    assert other.rewards(batch) == pytest.approx(whole.rewards(batch), rel=1e-10)
    alone = [whole.scores([scored.rollout]).item() for scored in batch]
    assert alone == pytest.approx(whole.rewards(batch), rel=1e-10)
    assert whole.learn(batch) == pytest.approx(other.learn(batch), rel=1e-10)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(other.weights[name].grad, weight.grad, rtol=1e-8, atol=1e-12)


def test_it_reads_whole_answers_whatever_of_them_is_trained_on() -> None:
    judge, batch = make_judge(), make_batch()
    masked = [changed(s, loss_mask=np.zeros_like(s.rollout.loss_mask)) for s in batch]
    assert judge.rewards(masked) == judge.rewards(batch)
    last = [changed(s, completion_ids=np.append(s.rollout.completion_ids[:-1], [3])) for s in batch]
    first = [changed(s, completion_ids=np.insert(s.rollout.completion_ids[1:], 0, 3)) for s in batch]
    for other in (last, first):
        assert judge.rewards(other) != judge.rewards(batch)


def test_it_neither_moves_the_student_nor_moves_with_it() -> None:
    trainer, batch = trainer_of("gad"), make_batch()
    before, said = weights_of(trainer.student), trainer.judge.rewards(batch)
    with torch.no_grad():
        for parameter in trainer.student.parameters():
            parameter.add_(0.1)
    assert trainer.judge.rewards(batch) == said
    moved = weights_of(trainer.student)
    trainer.judge.learn(batch)
    assert trainer.judge.rewards(batch) != said
    assert same(weights_of(trainer.student), moved)
    assert not same(moved, before)
    assert all(parameter.grad is None for parameter in trainer.student.parameters())


@pytest.mark.parametrize("tie", [False, True])
def test_it_holds_what_is_trained_of_the_student_but_no_output_head(tie: bool) -> None:
    judge, student = make_judge(tie=tie), make_trainer(tie=tie).student
    own = {name for name, _ in student.named_parameters()} - {"network.lm_head.weight"}
    assert judge.weights.keys() == own | {HEAD}
    judge.learn(make_batch())
    assert all(weight.grad is not None for weight in judge.weights.values())


def ends_with(ids: Sequence[int], *, seed: int, by: str) -> list[ScoredRollout]:
    batch = random_batch([(3, 4)] * 12, vocabulary=VOCABULARY - 2, seed=seed, by=by)
    return [
        changed(s, id=f"{s.rollout.prompt_id}/{by}", completion_ids=np.append(s.rollout.completion_ids[:-1], last))
        for s, last in zip(batch, np.resize(ids, len(batch)), strict=True)
    ]


def auc(judge: Discriminator, batch: Batch) -> float:
    scores = torch.tensor(judge.rewards(batch))
    of_others = torch.tensor([s.rollout.origin == "others" for s in batch])
    return (scores[of_others].unsqueeze(1) > scores[~of_others]).double().mean().item()


def test_authors_who_end_differently_are_told_apart_within_some_dozens_of_steps() -> None:
    judge = make_judge()
    unseen = ends_with([9], seed=100, by="others") + ends_with([10], seed=101, by="student")
    for step in range(36):
        judge.learn(ends_with([9], seed=2 * step, by="others") + ends_with([10], seed=2 * step + 1, by="student"))
    assert auc(make_judge(), unseen) < 0.95
    assert auc(judge, unseen) > 0.99


def test_authors_who_are_one_are_not_told_apart() -> None:
    judge = make_judge(lr=1e-3)
    for step in range(12):
        judge.learn(ends_with([9], seed=2 * step, by="others") + ends_with([9], seed=2 * step + 1, by="student"))
    assert 0.25 < auc(judge, ends_with([9], seed=100, by="others") + ends_with([9], seed=101, by="student")) < 0.75


@dataclasses.dataclass
class Shifted:
    """A judge that likes everything more."""

    judge: Discriminator
    by: float

    def rewards(self, batch: Sequence[ScoredRollout]) -> list[float]:
        return [score + self.by for score in self.judge.rewards(batch)]


def test_a_constant_added_to_all_scores_teaches_the_student_the_same() -> None:
    trainer, batch = trainer_of("gad"), make_batch()
    plain = computed(trainer, batch)
    trainer.judge = Shifted(trainer.judge, by=1000.0)  # type: ignore[assignment]
    assert plain[1].norm() > 1e-3
    assert_same(computed(trainer, batch), plain)


def test_the_student_is_paid_what_the_discriminator_says_and_not_what_the_rollout_came_with() -> None:
    batch = make_batch()
    judged = trainer_of("gad")
    paid = [changed(s, reward=d) for s, d in zip(batch, judged.judge.rewards(batch), strict=True)]
    verified = trainer_of("gad")
    verified.judge = Verifier()
    assert_same(computed(judged, batch), computed(verified, paid))
    unjudged = [changed(s, reward=math.nan) for s in batch]
    assert_same(computed(judged, unjudged), computed(judged, batch))


def take_steps(trainer: Trainer, steps: Sequence[int]) -> dict[str, float]:
    metrics: Mapping[str, float] = {}
    for step in steps:
        metrics = take_step(trainer, make_batch(), step).metrics
    return dict(metrics)


def test_for_ten_steps_the_discriminator_learns_alone() -> None:
    trainer = make_trainer(method="gad", teacher={"kind": "none"}, steps=20)
    found, scores = weights_of(trainer.student), trainer.judge.rewards(make_batch())
    metrics = take_steps(trainer, range(1, 11))
    assert same(weights_of(trainer.student), found)
    assert metrics["grad_norm"] == 0
    assert trainer.judge.rewards(make_batch()) != scores
    assert take_steps(trainer, [11])["grad_norm"] > 0
    assert not same(weights_of(trainer.student), found)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (lambda r: r.origin == "student", "prompt 'p0' has 2 of 'student'"),
        (lambda r: r.origin == "others", "prompt 'p0' has 1 of 'others'"),
        (lambda r: r.origin == "student" or r.prompt_id == "p0", "prompt 'p1' has 2 of 'student'"),
    ],
)
def test_a_prompt_without_both_authors_is_refused_before_anything_moves(kept: Any, says: str) -> None:
    trainer = make_trainer(method="gad", teacher={"kind": "none"})
    student, judge = weights_of(trainer.student), trainer.judge.state()
    batch = [scored for scored in make_batch() if kept(scored.rollout)]
    with pytest.raises(AlignmentError, match=says):
        trainer.judge.learn(batch)
    if any(scored.rollout.origin == "student" for scored in batch):
        with pytest.raises(AlignmentError, match=says):
            take_step(trainer, batch, 1)
    assert same(weights_of(trainer.student), student)
    assert same(trainer.judge.state(), judge)


def test_two_texts_of_others_or_a_privileged_one_are_refused() -> None:
    batch, judge = make_batch(), make_judge()
    with pytest.raises(AlignmentError, match="'p0' has 2 of 'others', 2 of 'student'"):
        judge.learn([*batch, changed(batch[2], id="again")])
    with pytest.raises(AlignmentError, match="'p0' has 1 of 'others', 1 of 'privileged', 2 of 'student'"):
        judge.learn([*batch, changed(batch[0], id="again", privileged=True)])


def test_a_score_or_a_gradient_that_is_not_finite_stops_it() -> None:
    judge = make_judge()
    before = judge.state()
    judge.weights["network.model.norm.weight"].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFinite, match="it has not moved"):
        judge.learn(make_batch())
    assert same(judge.state(), before)
    with pytest.raises(NonFinite, match=r"a score is not finite; lower objective\.judge\.lr"):
        with_head(judge, math.inf).rewards(make_batch())


def test_its_gradient_is_clipped() -> None:
    trainer = make_trainer(method="gad", objective={"judge": {"max_grad_norm": 1e-3}}, teacher={"kind": "none"})
    trainer.judge.learn(make_batch())
    assert isinstance(trainer.judge, Discriminator)
    norm = torch.cat([weight.grad.flatten() for weight in trainer.judge.weights.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-2)


# Kept and restored, on a student from a folder.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=0, hidden=32, layers=1)


def make_kept(model: Path, *, method: str = "gad", **student: Any) -> Trainer:
    changes = {"judge": {"lr": 1e-3}} if method == "gad" else {}
    config = make_config(
        method=method, objective=changes, teacher={"kind": "none"}, student={"model": str(model), **student}, steps=20
    )
    return Trainer(config, load_student(config.student, seed=0, device=CPU))


def kept_state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.judge.state().items()}


@pytest.mark.parametrize("student", [{}, LORA], ids=["all weights", "adapter"])
def test_a_restored_run_continues_bit_for_bit(student: dict[str, Any], model: Path, tmp_path: Path) -> None:
    through = make_kept(model, **student)
    take_steps(through, [10, 11, 12])
    folder = checkpoint.save(through, tmp_path / "step-000012", card="", tokenizer=model, extra={})
    at_save = kept_state(through)
    take_steps(through, [13, 14])

    resumed = make_kept(model, **student)
    checkpoint.restore(resumed, folder)
    assert same(resumed.judge.state(), at_save)
    take_steps(resumed, [13, 14])
    assert same(resumed.judge.state(), kept_state(through))
    assert same(weights_of(resumed.student), weights_of(through.student))
    assert not same(at_save, kept_state(through))


def test_an_adapters_discriminator_is_an_adapter(model: Path) -> None:
    trainer = make_kept(model, **LORA)
    assert isinstance(trainer.judge, Discriminator)
    trained = {name for name, parameter in trainer.student.named_parameters() if parameter.requires_grad}
    assert trainer.judge.weights.keys() == trained | {HEAD}
    assert 0 < len(trained) < len(list(trainer.student.parameters()))


@pytest.mark.parametrize(("written", "read"), [("gad", "grpo"), ("grpo", "gad")])
def test_a_checkpoint_of_a_run_with_another_judge_is_refused(
    written: str, read: str, model: Path, tmp_path: Path
) -> None:
    one = make_kept(model, method=written)
    folder = checkpoint.save(one, tmp_path / "step-000000", card="", tokenizer=model, extra={})
    with pytest.raises(ConfigError, match=r"discriminator, this run has none|judge is not this run's"):
        checkpoint.restore(make_kept(model, method=read), folder)


def test_a_run_without_one_neither_imports_nor_keeps_anything(model: Path, tmp_path: Path) -> None:
    assert not hasattr(learner.judge, "discriminator")
    trainer = make_kept(model, method="grpo")
    assert isinstance(trainer.judge, Verifier)
    assert trainer.judge.learn(make_batch()) == trainer.judge.state() == {}
    folder = checkpoint.save(trainer, tmp_path / "step-000000", card="", tokenizer=model, extra={})
    assert not (folder / "trainer" / "judge.safetensors").exists()
