"""What is trained on, what is left out, and what is refused before any gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from learner.aggregation import Denominators
from learner.targets import aligned, targets, teacher_context, trainable
from potstill.errors import AlignmentError
from potstill.methods import PRESETS, Objective
from potstill.types import ScoredRollout, ScoreStatus
from tests.rollouts import make_rollout, make_scored, random_batch
from tests.trainers import SELF_TEACHER, VOCABULARY, loss_and_gradient, make_trainer, same, take_step, weights_of

SAMPLED = PRESETS["opd_sampled"].objective
STUDENT_TOPK = Objective(support="student_topk", divergence="reverse_kl", k=2)
TEACHER_TOPK = Objective(support="teacher_topk", divergence="jsd", k=2, beta=0.5)
FULL = PRESETS["opsd"].objective
SFT = PRESETS["sft"].objective
CPU = torch.device("cpu")


def test_every_loss_token_with_a_score_is_trained_on() -> None:
    rollout = make_rollout(completion=[3, 4, 5], mask=[True, False, True])
    assert trainable(make_scored(rollout), SAMPLED).tolist() == [True, False, True]


@pytest.mark.parametrize("objective", [SAMPLED, STUDENT_TOPK, TEACHER_TOPK])
def test_a_token_that_the_teacher_did_not_score_is_left_out(objective: Objective) -> None:
    scored = make_scored(sampled=[-1.0, math.nan, -2.0])
    assert trainable(scored, objective).tolist() == [True, False, True]


@pytest.mark.parametrize("status", [ScoreStatus.FAILED, ScoreStatus.DEADLINE])
@pytest.mark.parametrize("objective", [SAMPLED, STUDENT_TOPK, TEACHER_TOPK])
def test_a_failed_item_is_left_out_whatever_its_numbers(objective: Objective, status: int) -> None:
    assert not trainable(make_scored(status=status), objective).any()


def test_a_token_without_the_samplers_log_prob_is_left_out_where_the_ratio_needs_it() -> None:
    scored = make_scored(make_rollout(student=[-1.0, math.nan, -1.0]))
    assert trainable(scored, SAMPLED).tolist() == [True, False, True]
    assert trainable(scored, STUDENT_TOPK).all()


def test_only_likelihood_trains_on_tokens_that_the_student_did_not_write() -> None:
    scored = make_scored(make_rollout(versions=[0, -1, 3]))
    assert trainable(scored, SFT).all()
    assert trainable(scored, SAMPLED).tolist() == [True, False, True]
    assert trainable(scored, FULL).tolist() == [True, False, True]


def test_likelihood_and_a_teacher_inside_the_learner_need_no_scores() -> None:
    scored = ScoredRollout(rollout=make_rollout(), scores=None)
    assert trainable(scored, SFT).all()
    assert trainable(scored, FULL).all()


def test_a_rollout_that_should_carry_scores_and_does_not_is_refused() -> None:
    with pytest.raises(AlignmentError, match="rollout a/0 carries no teacher's scores"):
        trainable(ScoredRollout(rollout=make_rollout(), scores=None), SAMPLED)


@pytest.mark.parametrize("field", ["topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail"])
def test_scores_of_another_length_are_refused_by_name(field: str) -> None:
    with pytest.raises(AlignmentError, match=f"a/0: scores.{field} has 2 rows for 3 tokens"):
        aligned(make_scored(**{field: np.zeros((2, 2))}))


def test_sampled_scores_of_another_length_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"scores\.sampled has 4 rows for 3 tokens"):
        aligned(make_scored(sampled=[-1.0] * 4))


def test_a_support_and_scores_of_other_widths_are_refused() -> None:
    rollout = make_rollout(completion=[3], support_ids=[[3, 4]])
    scored = make_scored(rollout, ids_logprobs=[[-0.1, -2.0, -3.0]], ids_tail=[-5.0])
    with pytest.raises(AlignmentError, match=r"\(1, 2\) ids but \(1, 3\) log-probs"):
        targets([scored], [np.array([True])], STUDENT_TOPK, CPU, None)


@pytest.mark.parametrize("objective", [STUDENT_TOPK, TEACHER_TOPK])
def test_a_rollout_that_was_not_scored_over_the_support_is_refused(objective: Objective) -> None:
    with pytest.raises(AlignmentError, match=f"was not scored over the {objective.support}"):
        targets([make_scored()], [np.ones(3, bool)], objective, CPU, None)


def test_a_self_teacher_without_its_context_is_refused() -> None:
    with pytest.raises(AlignmentError, match="a/0 has no teacher_context_ids"):
        teacher_context(make_rollout())


def two_scored() -> list[ScoredRollout]:
    first = make_scored(
        make_rollout(id="a/0", completion=[3, 4], student=[-0.3, -0.4], support_ids=[[3, 9], [4, 9]]),
        sampled=[-1.3, -1.4],
        topk_ids=[[7, 8], [6, 5]],
        topk_logprobs=[[-0.1, -3.0], [-0.2, -2.0]],
        topk_tail=[-4.1, -4.2],
        ids_logprobs=[[-1.3, -5.0], [-1.4, -6.0]],
        ids_tail=[-0.5, -0.6],
    )
    second = make_scored(
        make_rollout(id="b/0", completion=[5], student=[-0.5], support_ids=[[5, 9]]),
        sampled=[-1.5],
        topk_ids=[[1, 2]],
        topk_logprobs=[[-0.7, -0.8]],
        topk_tail=[-4.3],
        ids_logprobs=[[-1.5, -7.0]],
        ids_tail=[-0.7],
    )
    return [first, second]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (SFT, {"token_ids": [4, 5]}),
        (SAMPLED, {"token_ids": [4, 5], "behaviour": [-0.4, -0.5], "teacher": [-1.4, -1.5]}),
        (
            STUDENT_TOPK,
            {
                "token_ids": [4, 5],
                "support_ids": [[4, 9], [5, 9]],
                "teacher_support": [[-1.4, -6.0], [-1.5, -7.0]],
                "teacher_rest": [-0.6, -0.7],
            },
        ),
        (
            TEACHER_TOPK,
            {
                "token_ids": [4, 5],
                "support_ids": [[6, 5], [1, 2]],
                "teacher_support": [[-0.2, -2.0], [-0.7, -0.8]],
                "teacher_rest": [-4.2, -4.3],
            },
        ),
    ],
    ids=["sft", "sampled", "student_topk", "teacher_topk"],
)
def test_targets_are_what_the_objective_reads_of_the_kept_tokens(
    objective: Objective, expected: dict[str, Any]
) -> None:
    found = targets(two_scored(), [np.array([False, True]), np.array([True])], objective, CPU, None)
    fields = ("token_ids", "behaviour", "teacher", "support_ids", "teacher_support", "teacher_rest", "teacher_logits")
    filled = {name: value.tolist() for name in fields if (value := getattr(found, name)) is not None}
    assert filled == expected


def test_a_failed_item_leaves_the_gradient_to_the_others() -> None:
    batch = random_batch([(3, 4), (2, 5)], vocabulary=VOCABULARY, seed=1)
    failed = make_scored(batch[1].rollout, sampled=[math.nan] * 5, status=ScoreStatus.FAILED)
    trainer = make_trainer(objective={"k": 3})
    with_it, without = loss_and_gradient(trainer, [batch[0], failed]), loss_and_gradient(trainer, batch[:1])
    assert with_it[0] == without[0]
    assert torch.equal(with_it[1], without[1])


@pytest.mark.parametrize(("tokens", "sequences"), [(8, 2), (10, 2), (9, 1)])
def test_a_step_refuses_denominators_that_are_not_its_own(tokens: int, sequences: int) -> None:
    batch = random_batch([(3, 4), (2, 5)], vocabulary=VOCABULARY, seed=1)
    trainer = make_trainer(objective={"k": 3})
    before = weights_of(trainer.student)
    with pytest.raises(AlignmentError, match="holds 9 tokens of 2 sequences to train on"):
        trainer.step(batch, step=1, denominators=Denominators(num_loss_tokens=tokens, num_sequences=sequences))
    assert same(before, weights_of(trainer.student))


def test_a_step_of_unscored_tokens_alone_has_no_denominators() -> None:
    batch = [make_scored(status=ScoreStatus.FAILED)]
    with pytest.raises(ValueError, match="no step can be divided by"):
        take_step(make_trainer(), batch, 1)


def test_a_step_of_unscored_tokens_alone_is_refused_and_gives_no_nan() -> None:
    batch = [make_scored(sampled=[math.nan] * 3)]
    with pytest.raises(AlignmentError, match="holds 0 tokens of 0 sequences"):
        make_trainer().step(batch, step=1, denominators=Denominators(num_loss_tokens=3, num_sequences=1))


def test_a_self_teacher_is_read_through_the_rollouts_own_context() -> None:
    trainer = make_trainer(method="opsd", teacher=SELF_TEACHER)
    with pytest.raises(AlignmentError, match="has no teacher_context_ids"):
        take_step(trainer, [ScoredRollout(rollout=make_rollout(), scores=None)], 1)
