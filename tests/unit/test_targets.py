"""What is trained on, what is left out, and what is refused before any gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from learner.aggregation import Denominators
from learner.facts import Facts
from learner.targets import aligned, budgeted, gather, teacher_context, trainable
from potstill.algebra.objective import Objective
from potstill.errors import AlignmentError
from potstill.methods import PRESETS
from potstill.methods.method import objective as made
from potstill.types import ScoredRollout, ScoreStatus
from tests.rollouts import make_rollout, make_scored, random_batch
from tests.trainers import SELF_TEACHER, VOCABULARY, loss_and_gradient, make_trainer, same, take_step, weights_of

SAMPLED = PRESETS["opd_sampled"].objective
STUDENT_TOPK = made(support={"kind": "student_topk", "k": 2}, loss="reverse_kl", over="student")
TEACHER_TOPK = made(support={"kind": "teacher_topk", "k": 2}, loss="jsd", over="student")
FULL = PRESETS["opsd"].objective
SFT = PRESETS["sft"].objective
SWING = PRESETS["swing"].objective
SFT_TERM = {"loss": "likelihood", "over": "others"}
BUDGET = made(loss="likelihood", over="others", aggregation={"kind": "token_budget", "tokens": 4})
CPU = torch.device("cpu")


def others(id: str, length: int) -> ScoredRollout:
    """Text that the student did not write."""
    rollout = make_rollout(id=id, completion=[3] * length, versions=[-1] * length)
    return ScoredRollout(rollout=rollout, scores=None)


def gathered(batch: Sequence[ScoredRollout], masks: Sequence[Any], objective: Objective, **changes: Any) -> Facts:
    settings = {"device": CPU, "step": 1, "inside": False, "rewards": {}, **changes}
    return gather(batch, [np.asarray(mask) for mask in masks], objective, **settings)


def test_every_loss_token_with_a_score_is_trained_on() -> None:
    rollout = make_rollout(completion=[3, 4, 5], mask=[True, False, True])
    assert trainable(make_scored(rollout), SAMPLED, inside=False).tolist() == [True, False, True]


@pytest.mark.parametrize("objective", [SAMPLED, STUDENT_TOPK, TEACHER_TOPK])
def test_a_token_that_the_teacher_did_not_score_is_left_out(objective: Objective) -> None:
    scored = make_scored(sampled=[-1.0, math.nan, -2.0])
    assert trainable(scored, objective, inside=False).tolist() == [True, False, True]


@pytest.mark.parametrize("status", [ScoreStatus.FAILED, ScoreStatus.DEADLINE])
@pytest.mark.parametrize("objective", [SAMPLED, STUDENT_TOPK, TEACHER_TOPK])
def test_a_failed_item_is_left_out_whatever_its_numbers(objective: Objective, status: int) -> None:
    assert not trainable(make_scored(status=status), objective, inside=False).any()


def test_a_token_without_the_samplers_log_prob_is_left_out_where_the_ratio_needs_it() -> None:
    scored = make_scored(make_rollout(student=[-1.0, math.nan, -1.0]))
    assert trainable(scored, SAMPLED, inside=False).tolist() == [True, False, True]
    assert trainable(scored, STUDENT_TOPK, inside=False).all()


def test_tokens_that_the_student_did_not_write_inside_its_own_text_are_left_out() -> None:
    scored = make_scored(make_rollout(versions=[0, -1, 3]))
    assert trainable(scored, SAMPLED, inside=False).tolist() == [True, False, True]
    assert trainable(scored, FULL, inside=True).tolist() == [True, False, True]


def test_text_is_trained_on_where_a_term_is_over_its_origin() -> None:
    own = ScoredRollout(rollout=make_rollout(), scores=None)
    others = ScoredRollout(rollout=make_rollout(versions=[-1, -1, -1]), scores=None)
    assert trainable(others, SFT, inside=False).all()
    assert not trainable(own, SFT, inside=False).any()
    assert trainable(own, FULL, inside=True).all()
    assert not trainable(others, FULL, inside=True).any()


def test_a_rollout_that_should_carry_scores_and_does_not_is_refused() -> None:
    with pytest.raises(AlignmentError, match="rollout a/0 carries no teacher's scores"):
        trainable(ScoredRollout(rollout=make_rollout(), scores=None), SAMPLED, inside=False)


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
    with pytest.raises(AlignmentError, match=r"has \(3,\) entries a position, objective.support.k is 2"):
        gathered([scored], [[True]], STUDENT_TOPK)


@pytest.mark.parametrize(("objective", "missing"), [(STUDENT_TOPK, "ids_logprobs"), (TEACHER_TOPK, "topk_ids")])
def test_scores_that_lack_what_the_support_reads_are_refused_by_name(objective: Objective, missing: str) -> None:
    with pytest.raises(AlignmentError, match=f"did not send {missing}"):
        gathered([make_scored()], [[True] * 3], objective)


def test_how_private_the_loss_tokens_are_is_gathered_where_it_is_read() -> None:
    batch = [make_scored(make_rollout(privacy=row)) for row in ([1, 0, 0.5], [0, 1, 0])]
    masks = [[True, False, True], [False, True, True]]
    facts = gathered(batch, masks, SWING, inside=True)
    assert facts.privacy is not None
    assert facts.privacy.tolist() == [1, 0.5, 1, 0]
    assert gathered(batch, masks, FULL, inside=True).privacy is None


def test_a_rollout_that_does_not_say_how_private_it_is_is_refused() -> None:
    with pytest.raises(AlignmentError, match="rollout a/0 does not say how private its tokens are"):
        gathered([make_scored()], [[True] * 3], SWING, inside=True)


def test_a_teacher_with_a_prompt_of_its_own_needs_it_rendered() -> None:
    with pytest.raises(AlignmentError, match="a/0 has no teacher_context_ids"):
        teacher_context(make_rollout(), privileged=True)
    assert teacher_context(make_rollout(), privileged=False).tolist() == [1, 2]


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
        (SFT, {}),
        (SAMPLED, {"teacher": [-1.4, -1.5]}),
        (
            STUDENT_TOPK,
            {
                "teacher": [-1.4, -1.5],
                "support_ids": [[4, 9], [5, 9]],
                "teacher_support": [[-1.4, -6.0], [-1.5, -7.0]],
                "teacher_rest": [-0.6, -0.7],
            },
        ),
        (
            TEACHER_TOPK,
            {
                "teacher": [-1.4, -1.5],
                "topk_ids": [[6, 5], [1, 2]],
                "teacher_topk": [[-0.2, -2.0], [-0.7, -0.8]],
                "topk_rest": [-4.2, -4.3],
            },
        ),
    ],
    ids=["sft", "sampled", "student_topk", "teacher_topk"],
)
def test_facts_are_what_the_objective_reads_of_the_kept_tokens(objective: Objective, expected: dict[str, Any]) -> None:
    found = gathered(two_scored(), [[False, True], [True]], objective)
    always = {"token_ids": [4, 5], "positions": [1, 0], "origin": [0, 0], "behaviour": [-0.4, -0.5], "age": [0, 0]}
    filled = {f.name: v.tolist() for f in fields(Facts) if isinstance(v := getattr(found, f.name), torch.Tensor)}
    assert filled == {**always, **expected}
    assert (found.lengths, found.prompts, found.domains) == ((1, 1), ("a", "b"), ("test", "test"))


def test_the_teachers_top_k_is_there_for_a_gate_of_confidence_too() -> None:
    gated = made(**{**SAMPLED.model_dump(exclude={"auxiliaries"}), "gates": ["confidence"]})
    found = gathered(two_scored(), [[False, True], [True]], gated)
    assert found.teacher_topk[:, 0].tolist() == [-0.2, -0.7]


@pytest.mark.parametrize("shape", [(1,), (1, 0)])
@pytest.mark.parametrize("field", ["topk_ids", "topk_logprobs"])
def test_a_gate_of_confidence_refuses_scores_without_an_entry(field: str, shape: tuple[int, ...]) -> None:
    gated = made(**{**SAMPLED.model_dump(exclude={"auxiliaries"}), "gates": ["confidence"]})
    sound = {"topk_ids": np.array([[3]]), "topk_logprobs": np.array([[-0.1]]), "topk_tail": np.array([-2.0])}
    scored = make_scored(make_rollout(completion=[3]), **{**sound, field: np.zeros(shape)})
    with pytest.raises(AlignmentError, match="a/0 has no entry of the teacher's top-k"):
        gathered([scored], [[True]], gated)


def test_text_that_was_not_scored_lies_beside_scored_text_as_nan() -> None:
    others = ScoredRollout(rollout=make_rollout(id="c/0", completion=[8, 8], versions=[-1, -1]), scores=None)
    mixed = made(**STUDENT_TOPK.model_dump(exclude={"auxiliaries"}), auxiliaries={"text": SFT_TERM})
    found = gathered([two_scored()[1], others], [[True], [True, True]], mixed)
    assert found.origin.tolist() == [0, 2, 2]
    assert found.teacher_support[0].tolist() == [-1.5, -7.0]
    assert found.teacher_support[1:].isnan().all()
    assert found.support_ids.tolist() == [[5, 9], [0, 0], [0, 0]]


def test_draws_belong_to_completion_and_step_and_not_to_the_batch_they_are_in() -> None:
    sampling = made(support={"kind": "random_sampling", "draws": 4}, loss="forward_kl")
    both = gathered(two_scored(), [[True, True], [True]], sampling, inside=True).uniforms
    alone = gathered(two_scored()[1:], [[True]], sampling, inside=True).uniforms
    later = gathered(two_scored()[1:], [[True]], sampling, inside=True, step=2).uniforms
    assert torch.equal(both[2:], alone)
    assert not torch.equal(alone, later)
    assert both.shape == (3, 4)


def test_a_token_budget_cuts_the_step_to_its_size_and_nothing_else_does() -> None:
    batch = [others("a/0", 3), others("b/0", 3)]
    masks = [np.array([True, False, True]), np.array([True, True, True])]
    kept = budgeted(batch, masks, BUDGET, step=1)
    assert sum(int(mask.sum()) for mask in kept) == 4
    assert all((after <= before).all() for before, after in zip(masks, kept, strict=True))
    assert [m.tolist() for m in budgeted(batch, masks, SFT, step=1)] == [m.tolist() for m in masks]


def test_a_budget_is_of_the_text_that_its_term_is_over() -> None:
    batch = [ScoredRollout(rollout=make_rollout(), scores=None), others("b/0", 5)]
    kept = budgeted(batch, [np.array([True] * 3), np.array([True] * 5)], BUDGET, step=1)
    assert [int(mask.sum()) for mask in kept] == [3, 4]


@pytest.mark.parametrize("field", ["prompt_ids", "completion_ids", "support_ids", "draw_ids", "teacher_context_ids"])
@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_an_id_outside_the_vocabulary_is_refused_by_name(field: str, wrong: int) -> None:
    scored = random_batch([(3, 4)], vocabulary=VOCABULARY, seed=1)[0]
    ids = getattr(scored.rollout, field).copy()
    ids[-1] = wrong
    spoilt = ScoredRollout(rollout=replace(scored.rollout, **{field: ids}), scores=scored.scores)
    with pytest.raises(AlignmentError, match=f"p0/0: {field} holds an id outside the vocabulary of {VOCABULARY}"):
        take_step(make_trainer(objective={"support": {"k": 3}}), [spoilt], 1)


def test_a_failed_item_leaves_the_gradient_to_the_others() -> None:
    batch = random_batch([(3, 4), (2, 5)], vocabulary=VOCABULARY, seed=1)
    failed = make_scored(batch[1].rollout, sampled=[math.nan] * 5, status=ScoreStatus.FAILED)
    trainer = make_trainer(objective={"support": {"k": 3}})
    with_it, without = loss_and_gradient(trainer, [batch[0], failed]), loss_and_gradient(trainer, batch[:1])
    assert with_it[0] == without[0]
    assert torch.equal(with_it[1], without[1])


@pytest.mark.parametrize(("tokens", "sequences"), [(8, 2), (10, 2), (9, 1)])
def test_a_step_refuses_denominators_that_are_not_its_own(tokens: int, sequences: int) -> None:
    batch = random_batch([(3, 4), (2, 5)], vocabulary=VOCABULARY, seed=1)
    trainer = make_trainer(objective={"support": {"k": 3}})
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
