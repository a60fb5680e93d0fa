"""Each method's whole training gradient against its formula, written out token by token and outcome by outcome.

The reference is slow and literal: plain transformers, float64, one sequence at a time, Python loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.algebra.objective import Objective
from potstill.errors import NonFinite
from potstill.methods import PRESETS
from potstill.types import ScoredRollout
from tests.golden import distribution, evaluate, make_facts
from tests.rollouts import random_batch
from tests.trainers import (
    PLAIN,
    SELF_TEACHER,
    VOCABULARY,
    loss_and_gradient,
    make_network,
    make_trainer,
    plain_logits,
)

CASES: dict[str, dict[str, Any]] = {
    "opd_sampled": {"method": "opd_sampled"},
    "opd_sampled, ratios cut": {"method": "opd_sampled", "objective": {"correction": {"cap": 0.7}}},
    "opd": {"method": "opd", "objective": {"support": {"k": 3}}},
    "opd, each sequence the same": {
        "method": "opd",
        "objective": {"support": {"k": 3}, "aggregation": "sequence_mean"},
    },
    "gkd_topk": {"method": "gkd_topk", "objective": {"support": {"k": 3}}},
    "gkd_topk, beta 0.1": {"method": "gkd_topk", "objective": {"support": {"k": 3}, "loss": {"beta": 0.1}}},
    "gkd_topk, forward": {"method": "gkd_topk", "objective": {"support": {"k": 3}, "loss": "forward_kl"}},
    "opsd": {"method": "opsd", "teacher": SELF_TEACHER},
    "opsd, not clipped": {"method": "opsd", "teacher": SELF_TEACHER, "objective": {"loss": {"pointwise_clip": None}}},
    "opsd_reverse": {"method": "opsd_reverse", "teacher": SELF_TEACHER},
    "opsd, jsd": {"method": "opsd", "teacher": SELF_TEACHER, "objective": {"loss": {"kind": "jsd", "beta": 0.5}}},
    "sft": {"method": "sft"},
}


def reference(batch: Sequence[ScoredRollout], masks: Sequence[Any], objective: Objective) -> tuple[float, Tensor]:
    """Loss and gradient of the whole step, from the definitions."""
    student, teacher = make_network(attention=PLAIN), make_network(attention=PLAIN)
    num_tokens, num_sequences = sum(mask.sum() for mask in masks), sum(mask.any() for mask in masks)
    total = torch.zeros((), dtype=torch.float64)
    for scored, mask in zip(batch, masks, strict=True):
        rollout = scored.rollout
        own = plain_logits(student, rollout.prompt_ids, rollout.completion_ids)
        with torch.no_grad():
            teachers = plain_logits(teacher, rollout.teacher_context_ids, rollout.completion_ids)
        for t in np.flatnonzero(mask):
            loss = token_loss(scored, int(t), own[t].softmax(-1), teachers[t].softmax(-1).tolist(), objective)
            by = num_tokens if objective.aggregation.kind == "token_mean" else num_sequences * mask.sum()
            total = total + loss / by
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def token_loss(scored: ScoredRollout, t: int, q: Tensor, teacher: list[float], objective: Objective) -> Tensor:
    rollout, scores = scored.rollout, scored.scores
    written = int(rollout.completion_ids[t])
    if objective.loss.kind == "likelihood":
        return -q[written].log()
    if objective.support.kind == "sampled":
        ratio = min(q[written].item() / math.exp(rollout.student_logprobs[t]), objective.correction.cap)
        advantage = scores.sampled[t] - math.log(q[written].item())
        policy_gradient = -ratio * advantage * q[written].log()
        return policy_gradient - policy_gradient.detach() - ratio * advantage  # its value is −ρA
    if objective.support.kind == "full":
        return divergence(list(q), teacher, objective)
    if objective.support.kind == "student_topk":
        ids, logprobs, tail = rollout.support_ids[t], scores.ids_logprobs[t], scores.ids_tail[t]
    else:
        ids, logprobs, tail = scores.topk_ids[t], scores.topk_logprobs[t], scores.topk_tail[t]
    kept = [q[i] for i in ids]
    return divergence([*kept, 1 - sum(kept)], [math.exp(x) for x in [*logprobs, tail]], objective)


def divergence(q: list[Tensor], p: list[float], objective: Objective) -> Tensor:
    pairs = list(zip(q, p, strict=True))
    if objective.loss.kind == "forward_kl":
        terms = [b * (math.log(b) - a.log()) for a, b in pairs]
        cap = objective.loss.pointwise_clip
        return sum(term if cap is None or term < cap else torch.tensor(cap, dtype=torch.float64) for term in terms)
    if objective.loss.kind == "reverse_kl":
        return sum(a * (a.log() - math.log(b)) for a, b in pairs)
    beta = objective.loss.beta
    mixed = [beta * b + (1 - beta) * a for a, b in pairs]
    from_teacher = sum(b * (math.log(b) - m.log()) for b, m in zip(p, mixed, strict=True))
    from_student = sum(a * (a.log() - m.log()) for a, m in zip(q, mixed, strict=True))
    return beta * from_teacher + (1 - beta) * from_student


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_gradient_is_that_of_the_formula(case: dict[str, Any]) -> None:
    # 4 + 2 + 1 + 1 loss tokens: every weight is a power of two, which float32 holds exactly.
    masks = [[True, False, True, True, True], [True, True], [False, True, False], [True]]
    by = "others" if case["method"] == "sft" else "student"
    batch = random_batch([(3, 5), (5, 2), (1, 3), (2, 1)], vocabulary=VOCABULARY, seed=7, masks=masks, by=by)
    trainer = make_trainer(**case, learner={"micro_batch_tokens": 11, "chunk_tokens": 2})
    loss, gradient = loss_and_gradient(trainer, batch)
    expected_loss, expected = reference(batch, trainer.masks(batch), trainer.config.objective)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    assert expected.abs().max() > 1e-3


def test_a_clip_that_never_binds_is_no_clip_and_the_clip_of_the_case_binds() -> None:
    """The case "opsd" above tests the clip only if it does something there."""
    batch = random_batch([(3, 4), (5, 2)], vocabulary=VOCABULARY, seed=7)

    def gradient(pointwise_clip: float | None) -> Tensor:
        trainer = make_trainer(
            method="opsd", teacher=SELF_TEACHER, objective={"loss": {"pointwise_clip": pointwise_clip}}
        )
        return loss_and_gradient(trainer, batch)[1]

    torch.testing.assert_close(gradient(1e6), gradient(None))
    assert (gradient(0.05) - gradient(None)).norm() > 0.05 * gradient(None).norm()


OPD = PRESETS["opd"].objective
LOOKED_UP = {
    "support_ids": torch.tensor([[1, 2]]),
    "teacher_support": torch.tensor([[0.5, 0.25]]).double().log(),
    "teacher_rest": torch.tensor([0.25]).double().log(),
}
"""What a teacher behind HTTP says of one token, whose student kept the ids 1 and 2."""

LOOKED_UP_HALF = {
    "support_ids": torch.tensor([[0]] * 4),
    "teacher_support": torch.tensor([[0.5]] * 4).double().log(),
    "teacher_rest": torch.tensor([0.5] * 4).double().log(),
}
"""The same of four tokens, of two outcomes each."""


def test_measures_of_a_top_k_are_those_of_the_definitions() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).double().log()
    loss, _, tally = evaluate(OPD, logits, make_facts([1], token_ids=[1], **LOOKED_UP))
    expected = 0.2 * math.log(0.2 / 0.5) + 0.4 * math.log(0.4 / 0.25) + 0.4 * math.log(0.4 / 0.25)
    assert loss == pytest.approx(expected)
    assert tally.sums["reverse_kl"].item() == pytest.approx(expected)
    assert tally.sums["captured_mass"].item() == pytest.approx(0.6)
    assert tally.sums["captured_mass_teacher"].item() == pytest.approx(0.75)
    assert tally.sums["overlap"].item() == pytest.approx(0.2 + 0.25 + 0.25)
    assert tally.sums["teacher_entropy"].item() == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.25, 0.25)))
    assert tally.sums["entropy"].item() == pytest.approx(-sum(q * math.log(q) for q in (0.1, 0.2, 0.3, 0.4)))
    assert tally.counts["entropy"] == 1


@pytest.mark.parametrize("rest", ["renorm", "partial"])
def test_what_lies_outside_a_top_k_is_measured_where_the_loss_does_not_see_it(rest: str) -> None:
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).double().log()
    blind = Objective.model_validate({**OPD.chosen(), "support": {"kind": "student_topk", "k": 2, "rest": rest}})
    _, _, tally = evaluate(blind, logits, make_facts([1], token_ids=[1], **LOOKED_UP))
    assert tally.sums["captured_mass"].item() == pytest.approx(0.6)
    assert tally.sums["captured_mass_teacher"].item() == pytest.approx(0.75)
    assert "reverse_kl" not in tally.sums


def test_a_teacher_inside_the_learner_is_measured_over_the_whole_vocabulary() -> None:
    q, p = torch.tensor([[0.1, 0.9]]).double(), torch.tensor([[0.5, 0.5]]).double()
    _, _, tally = evaluate(PRESETS["opsd"].objective, q.log(), make_facts([1], token_ids=[1], **distribution(p.log())))
    assert tally.sums["overlap"].item() == pytest.approx(0.6)
    assert tally.sums["teacher_entropy"].item() == pytest.approx(math.log(2))
    assert "captured_mass" not in tally.sums


def test_a_step_says_how_far_the_student_is_from_what_sampled_its_text() -> None:
    """Two tokens of the very student, one of two versions ago, one that nobody sampled."""
    logits = torch.tensor([[0.5, 0.5]] * 4).double().log()
    sampled = torch.tensor([0.5, 0.25, 0.25, math.nan]).double().log()
    facts = make_facts([4], token_ids=[0] * 4, behaviour=sampled, age=torch.tensor([0, 0, 2, -1]), **LOOKED_UP_HALF)
    _, _, tally = evaluate(OPD, logits, facts)
    assert (tally.sums["sampler_gap"].item(), tally.counts["sampler_gap"]) == (pytest.approx(math.log(2)), 2)
    assert (tally.sums["staleness_kl"].item(), tally.counts["staleness_kl"]) == (pytest.approx(1 - math.log(2)), 1)


def test_text_that_the_student_did_not_write_has_no_distance_from_its_sampler() -> None:
    said = {"behaviour": torch.tensor([math.nan]).double(), "age": torch.tensor([-1])}
    facts = make_facts([1], token_ids=[0], origins=["others"], **said)
    _, _, tally = evaluate(PRESETS["sft"].objective, torch.zeros(1, 2).double(), facts)
    assert tally.sums.keys() == {"entropy"}


def test_measures_of_the_sampled_token_are_those_of_the_definitions() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7]]).double().log()
    said = {"behaviour": torch.tensor([0.35]).double().log(), "teacher": torch.tensor([0.5]).double().log()}
    facts = make_facts([1], token_ids=[2], **said)
    loss, _, tally = evaluate(PRESETS["opd_sampled"].objective, logits, facts)
    assert tally.sums["reverse_kl"].item() == pytest.approx(math.log(0.7 / 0.5))
    assert tally.sums["ratio_mean"].item() == pytest.approx(2)
    assert loss == pytest.approx(2 * math.log(0.7 / 0.5))


def test_rows_of_a_chunk_read_their_own_facts() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]] * 3).double().log()
    facts = make_facts([2, 1], token_ids=[0, 1, 2], origins=["others", "others"])
    loss, _, _ = evaluate(PRESETS["sft"].objective, logits, facts, chunk_tokens=1)
    assert loss == pytest.approx(-sum(math.log(q) for q in (0.5, 0.3, 0.2)) / 3)


@pytest.mark.parametrize("missing", ["support_ids", "teacher_support", "teacher_rest"])
def test_a_missing_fact_is_named(missing: str) -> None:
    facts = make_facts([1], token_ids=[1], **{**LOOKED_UP, missing: None})
    with pytest.raises(ValueError, match=f"reads facts.{missing}, which is missing"):
        evaluate(OPD, torch.zeros(1, 4).double(), facts)


@pytest.mark.parametrize(("method", "missing"), [("opd_sampled", "teacher"), ("opsd", "teacher_logits")])
def test_a_fact_that_another_objective_reads_does_not_stand_in(method: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"reads facts.{missing}, which is missing"):
        evaluate(PRESETS[method].objective, torch.zeros(1, 4).double(), make_facts([1], token_ids=[1], **LOOKED_UP))


def test_a_score_that_is_nan_is_refused_where_it_counts_and_harmless_where_it_does_not() -> None:
    scores = {**LOOKED_UP, "teacher_support": torch.tensor([[0.0, math.nan]]).double()}
    logits = torch.zeros(1, 4).double()
    with pytest.raises(NonFinite, match="'main': a row that counts"):
        evaluate(OPD, logits, make_facts([1], token_ids=[1], **scores))
    both = {name: value.repeat(2, 1) if value.ndim == 2 else value.repeat(2) for name, value in LOOKED_UP.items()}
    both["teacher_support"] = torch.cat([LOOKED_UP["teacher_support"], scores["teacher_support"]])
    mixed = make_facts([1, 1], token_ids=[1, 1], origins=["student", "others"], **both)
    assert math.isfinite(evaluate(OPD, logits.repeat(2, 1), mixed)[0])


def test_a_teacher_with_nothing_outside_the_support_is_welcome() -> None:
    facts = make_facts([1], token_ids=[1], **{**LOOKED_UP, "teacher_rest": torch.tensor([-math.inf]).double()})
    assert math.isfinite(evaluate(OPD, torch.zeros(1, 4).double(), facts)[0])


def test_auxiliary_terms_add_up_and_are_told_apart() -> None:
    text = {"loss": "likelihood", "over": "others", "weight": 0.1}
    objective = Objective.model_validate({**OPD.model_dump(), "auxiliaries": {"text": text}})
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    both = {name: value.repeat(2, 1) if value.ndim == 2 else value.repeat(2) for name, value in LOOKED_UP.items()}
    facts = make_facts([1, 1], token_ids=[1, 3], origins=["student", "others"], **both)
    loss, _, tally = evaluate(objective, logits, facts)
    alone, _, _ = evaluate(OPD, logits[:1], make_facts([1], token_ids=[1], **LOOKED_UP))
    nll = -logits[1].log_softmax(-1)[3].item()
    assert tally.losses["text"].item() == pytest.approx(0.1 * nll)
    assert loss == pytest.approx(alone + 0.1 * nll)


def test_a_weight_that_is_a_ramp_is_what_the_step_says() -> None:
    ramp = {"start": 1.0, "end": 0.0, "from_step": 1, "to_step": 5}
    objective = Objective.model_validate({**OPD.model_dump(), "weight": ramp})
    logits, facts = torch.zeros(1, 4).double(), make_facts([1], token_ids=[1], **LOOKED_UP)
    full, _, _ = evaluate(OPD, logits, facts)
    assert evaluate(objective, logits, facts, step=1)[0] == pytest.approx(full)
    assert evaluate(objective, logits, facts, step=3)[0] == pytest.approx(full / 2)
