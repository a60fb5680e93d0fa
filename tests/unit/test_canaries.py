"""The canaries live on honest data and each dies of the fault it is there for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from learner import canaries
from learner.logprobs import Tally
from learner.trainer import Batch, Masks, Trainer
from potstill.errors import RunError, SignalLost
from potstill.types import ScoredRollout, ScoreStatus, TeacherScores
from potstill.wire import Ask, unscored
from tests.rollouts import IDENTITY, make_rollout, scores_of
from tests.trainers import (
    PLAIN,
    VOCABULARY,
    make_config,
    make_network,
    make_student,
    make_trainer,
    plain_logits,
    same,
    weights_of,
)

STUDENT, TEACHER, K = 0, 1, 3
METHODS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd", "objective": {"support": {"k": K}}},
    "opd_sampled": {"method": "opd_sampled"},
    "gkd_topk": {"method": "gkd_topk", "objective": {"support": {"k": K}}},
    "async_opd": {"method": "async_opd", "objective": {"support": {"m": 4}}},
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def logprobs(seed: int, prompt: Sequence[int], completion: Sequence[int]) -> Any:
    """[T, V] of a model of this seed, from an ordinary forward pass."""
    with torch.no_grad():
        return plain_logits(make_network(seed=seed, attention=PLAIN), prompt, completion).log_softmax(-1).numpy()


def honest_batch(
    *, lengths: Sequence[int] = (4, 6, 2), sampler: int = STUDENT, teacher: int = TEACHER
) -> list[ScoredRollout]:
    """What a real first step holds: the sampler's own log-probs, its top-k, and the teacher's scores of the same."""
    random = np.random.default_rng(0)
    batch = []
    for number, length in enumerate(lengths):
        prompt, completion = random.integers(0, VOCABULARY, 3), random.integers(0, VOCABULARY, length)
        own, teachers = logprobs(sampler, prompt, completion), logprobs(teacher, prompt, completion)
        support, topk = np.argsort(-own, axis=1)[:, :K], np.argsort(-teachers, axis=1)[:, :K]
        draws = random.integers(0, VOCABULARY, (length, 4))
        rollout = make_rollout(
            id=f"p{number}/0",
            prompt=prompt,
            completion=completion,
            student=own[np.arange(length), completion],
            support_ids=support,
            draw_ids=draws,
            draw_logprobs=np.take_along_axis(own, draws, axis=1),
        )
        scores = scores_of(teachers, completion=completion, topk=topk, support=support, draws=draws)
        batch.append(ScoredRollout(rollout=rollout, scores=scores))
    return batch


def rewritten(batch: Batch, change: Callable[[Any], Any]) -> list[ScoredRollout]:
    """The batch with `change` done to every array of its scores."""

    def scores(own: TeacherScores) -> TeacherScores:
        arrays = {f.name: getattr(own, f.name) for f in dataclasses.fields(own) if f.name not in ("status", "identity")}
        return dataclasses.replace(own, **{n: change(a) for n, a in arrays.items() if a is not None})

    return [ScoredRollout(rollout=scored.rollout, scores=scores(scored.scores)) for scored in batch]


class Backwards(Trainer):
    """Reads every completion's scores from its last token to its first."""

    def accumulate(self, batch: Batch, masks: Masks, *rest: Any, step: int) -> Tally:
        return super().accumulate(rewritten(batch, lambda a: a[::-1].copy()), masks, *rest, step=step)


class OneTokenOff(Trainer):
    """Reads each token's scores one place too early."""

    def accumulate(self, batch: Batch, masks: Masks, *rest: Any, step: int) -> Tally:
        return super().accumulate(rewritten(batch, lambda a: np.roll(a, 1, axis=0)), masks, *rest, step=step)


class Deaf(Trainer):
    """Goes on using the first scores that it ever heard."""

    heard: Batch | None = None

    def accumulate(self, batch: Batch, masks: Masks, *rest: Any, step: int) -> Tally:
        self.heard = self.heard or batch
        return super().accumulate(self.heard, masks, *rest, step=step)


@every_method
def test_they_live_on_honest_data(method: dict[str, Any]) -> None:
    found = canaries.check(make_trainer(seed=STUDENT, **method), honest_batch())
    assert found["sampler_gap"] < 1e-9
    assert abs(found["mirror_loss"]) < 1e-9
    assert found["scramble_change"] > 0.1


@every_method
def test_they_live_when_teacher_and_student_are_the_same_model(method: dict[str, Any]) -> None:
    """Nothing to learn is no fault of the pipeline."""
    found = canaries.check(make_trainer(seed=STUDENT, **method), honest_batch(teacher=STUDENT))
    assert found["scramble_change"] > 0.1


@every_method
def test_they_live_when_every_answer_is_one_token(method: dict[str, Any]) -> None:
    found = canaries.check(make_trainer(seed=STUDENT, **method), honest_batch(lengths=[1, 1, 1]))
    assert found["scramble_change"] > 0.1


@every_method
def test_they_leave_the_trainer_as_it_was(method: dict[str, Any]) -> None:
    trainer = make_trainer(seed=STUDENT, **method)
    before = weights_of(trainer.student)
    canaries.check(trainer, honest_batch())
    assert same(before, weights_of(trainer.student))
    assert not trainer.optimizer.state
    assert all(parameter.grad is None for parameter in trainer.student.parameters())
    assert trainer.version == 0


@every_method
def test_a_sampler_with_other_weights_is_found(method: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="sampler and learner disagree by"):
        canaries.check(make_trainer(seed=STUDENT, **method), honest_batch(sampler=TEACHER))


def test_a_tempered_sampler_is_not_compared_with_the_student_at_temperature_one() -> None:
    found = canaries.check(make_trainer(seed=STUDENT, temperature=0.8, **METHODS["opd"]), honest_batch(sampler=7))
    assert math.isnan(found["sampler_gap"])


def test_a_sampler_that_reports_no_log_probs_is_found() -> None:
    batch = honest_batch()
    silent = make_rollout(completion=[1, 2], student=[-1.0, math.nan], support_ids=[[1, 2, 3]] * 2)
    scores = rewritten(batch[2:], lambda a: a)[0].scores
    with pytest.raises(RunError, match="disagree by nan"):
        canaries.check(make_trainer(seed=STUDENT, **METHODS["opd"]), [ScoredRollout(rollout=silent, scores=scores)])


def test_a_token_that_a_teacher_put_in_is_compared_with_nobody_and_the_others_are() -> None:
    def revised(sampler: int) -> list[ScoredRollout]:
        batch = honest_batch(sampler=sampler)
        own = batch[0].rollout.student_logprobs.copy()
        own[1] = math.nan
        return [
            ScoredRollout(rollout=dataclasses.replace(batch[0].rollout, student_logprobs=own), scores=batch[0].scores)
        ]

    trainer = make_trainer(seed=STUDENT, **METHODS["gkd_topk"])
    rollout = trainer.config.rollout.model_copy(update={"source": "revision"})
    trainer.config = trainer.config.model_copy(update={"rollout": rollout})
    assert canaries.check(trainer, revised(STUDENT))["sampler_gap"] < 1e-9
    with pytest.raises(RunError, match="sampler and learner disagree by"):
        canaries.check(trainer, revised(TEACHER))


@every_method
@pytest.mark.parametrize("fault", [Backwards, OneTokenOff])
def test_scores_that_reach_the_wrong_tokens_are_found(fault: type[Trainer], method: dict[str, Any]) -> None:
    trainer = fault(make_config(**method), make_student(seed=STUDENT))
    with pytest.raises(RunError, match="student against itself"):
        canaries.check(trainer, honest_batch())


@every_method
def test_scores_that_are_not_used_are_found(method: dict[str, Any]) -> None:
    trainer = Deaf(make_config(**method), make_student(seed=STUDENT))
    with pytest.raises(RunError, match="they are not being used"):
        canaries.check(trainer, honest_batch())


@every_method
def test_items_that_the_teacher_failed_to_score_are_left_out(method: dict[str, Any]) -> None:
    batch = honest_batch()
    failed = unscored(IDENTITY, ScoreStatus.FAILED, num_tokens=4, ask=Ask(top_k=K, num_ids=K))
    with_failed = [ScoredRollout(rollout=batch[0].rollout, scores=failed), *batch[1:]]
    trainer = make_trainer(seed=STUDENT, **method)
    assert canaries.check(trainer, with_failed) == canaries.check(trainer, batch[1:])


def test_a_batch_without_any_score_is_no_pass() -> None:
    failed = unscored(IDENTITY, ScoreStatus.DEADLINE, num_tokens=4, ask=Ask(top_k=K))
    batch = [ScoredRollout(rollout=honest_batch()[0].rollout, scores=failed)]
    with pytest.raises(SignalLost, match="the teacher scored none"):
        canaries.check(make_trainer(seed=STUDENT, **METHODS["gkd_topk"]), batch)
