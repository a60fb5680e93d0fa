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

from learner.objective import Targets, row_loss
from potstill.errors import NonFinite
from potstill.methods import PRESETS, Objective
from potstill.types import ScoredRollout
from tests.rollouts import random_batch
from tests.trainers import (
    PLAIN,
    SELF_TEACHER,
    VOCABULARY,
    loss_and_gradient,
    make_network,
    make_trainer,
    masks_of,
    plain_logits,
)

CASES: dict[str, dict[str, Any]] = {
    "opd_sampled": {"method": "opd_sampled"},
    "opd_sampled, ratios cut": {"method": "opd_sampled", "objective": {"ratio_cap": 0.7}},
    "opd": {"method": "opd", "objective": {"k": 3}},
    "opd, each sequence the same": {"method": "opd", "objective": {"k": 3, "aggregation": "sequence_mean"}},
    "gkd": {"method": "gkd", "objective": {"k": 3}},
    "gkd, beta 0.1": {"method": "gkd", "objective": {"k": 3, "beta": 0.1}},
    "gkd, forward": {"method": "gkd", "objective": {"k": 3, "divergence": "forward_kl", "beta": None}},
    "opsd": {"method": "opsd", "teacher": SELF_TEACHER},
    "opsd, not clipped": {"method": "opsd", "teacher": SELF_TEACHER, "objective": {"pointwise_clip": None}},
    "opsd, reverse": {
        "method": "opsd",
        "teacher": SELF_TEACHER,
        "objective": {"divergence": "reverse_kl", "pointwise_clip": None},
    },
    "opsd, jsd": {
        "method": "opsd",
        "teacher": SELF_TEACHER,
        "objective": {"divergence": "jsd", "beta": 0.5, "pointwise_clip": None},
    },
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
            by = num_tokens if objective.aggregation == "token_mean" else num_sequences * mask.sum()
            total = total + loss / by
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def token_loss(scored: ScoredRollout, t: int, q: Tensor, teacher: list[float], objective: Objective) -> Tensor:
    rollout, scores = scored.rollout, scored.scores
    written = int(rollout.completion_ids[t])
    if objective.divergence == "nll":
        return -q[written].log()
    if objective.support == "sampled":
        ratio = min(q[written].item() / math.exp(rollout.student_logprobs[t]), objective.ratio_cap)
        advantage = scores.sampled[t] - math.log(q[written].item())
        policy_gradient = -ratio * advantage * q[written].log()
        return policy_gradient - policy_gradient.detach() - ratio * advantage  # its value is −ρA
    if objective.support == "full":
        return divergence(list(q), teacher, objective)
    if objective.support == "student_topk":
        ids, logprobs, tail = rollout.support_ids[t], scores.ids_logprobs[t], scores.ids_tail[t]
    else:
        ids, logprobs, tail = scores.topk_ids[t], scores.topk_logprobs[t], scores.topk_tail[t]
    kept = [q[i] for i in ids]
    return divergence([*kept, 1 - sum(kept)], [math.exp(x) for x in [*logprobs, tail]], objective)


def divergence(q: list[Tensor], p: list[float], objective: Objective) -> Tensor:
    pairs = list(zip(q, p, strict=True))
    if objective.divergence == "forward_kl":
        terms = [b * (math.log(b) - a.log()) for a, b in pairs]
        cap = objective.pointwise_clip
        return sum(term if cap is None or term < cap else torch.tensor(cap, dtype=torch.float64) for term in terms)
    if objective.divergence == "reverse_kl":
        return sum(a * (a.log() - math.log(b)) for a, b in pairs)
    beta = objective.beta
    mixed = [beta * b + (1 - beta) * a for a, b in pairs]
    from_teacher = sum(b * (math.log(b) - m.log()) for b, m in zip(p, mixed, strict=True))
    from_student = sum(a * (a.log() - m.log()) for a, m in zip(q, mixed, strict=True))
    return beta * from_teacher + (1 - beta) * from_student


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_gradient_is_that_of_the_formula(case: dict[str, Any]) -> None:
    # 4 + 2 + 1 + 1 loss tokens: every weight is a power of two, which float32 holds exactly.
    masks = [[True, False, True, True, True], [True, True], [False, True, False], [True]]
    batch = random_batch([(3, 5), (5, 2), (1, 3), (2, 1)], vocabulary=VOCABULARY, seed=7, masks=masks)
    trainer = make_trainer(**case, learner={"micro_batch_tokens": 11, "chunk_tokens": 2})
    loss, gradient = loss_and_gradient(trainer, batch)
    expected_loss, expected = reference(batch, masks_of(trainer, batch), trainer.config.objective)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    assert expected.abs().max() > 1e-3


def test_a_clip_that_never_binds_is_no_clip_and_the_clip_of_the_case_binds() -> None:
    """The case "opsd" above tests the clip only if it does something there."""
    batch = random_batch([(3, 4), (5, 2)], vocabulary=VOCABULARY, seed=7)

    def gradient(pointwise_clip: float | None) -> Tensor:
        trainer = make_trainer(method="opsd", teacher=SELF_TEACHER, objective={"pointwise_clip": pointwise_clip})
        return loss_and_gradient(trainer, batch)[1]

    torch.testing.assert_close(gradient(1e6), gradient(None))
    assert (gradient(0.05) - gradient(None)).norm() > 0.05 * gradient(None).norm()


def opd_targets(**changes: Any) -> Targets:
    fields = {
        "token_ids": torch.tensor([1]),
        "support_ids": torch.tensor([[1, 2]]),
        "teacher_support": torch.tensor([[0.5, 0.25]]).log(),
        "teacher_rest": torch.tensor([0.25]).log(),
    }
    return Targets(**{**fields, **changes})


def test_metrics_of_a_top_k_are_those_of_the_definitions() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log()
    objective = Objective(support="student_topk", divergence="reverse_kl", k=2)
    loss, metrics = row_loss(objective, opd_targets())(logits, slice(0, 1))
    expected = 0.2 * math.log(0.2 / 0.5) + 0.4 * math.log(0.4 / 0.25) + 0.4 * math.log(0.4 / 0.25)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["reverse_kl"].item() == pytest.approx(expected, rel=1e-5)
    assert metrics["captured_mass"].item() == pytest.approx(0.6, rel=1e-5)
    assert metrics["entropy"].item() == pytest.approx(-sum(q * math.log(q) for q in (0.1, 0.2, 0.3, 0.4)), rel=1e-5)


def test_metrics_of_the_sampled_token_are_those_of_the_definitions() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    read = Targets(token_ids=torch.tensor([2]), behaviour=torch.tensor([0.35]).log(), teacher=torch.tensor([0.5]).log())
    loss, metrics = row_loss(PRESETS["opd_sampled"].objective, read)(logits, slice(0, 1))
    assert metrics["reverse_kl"].item() == pytest.approx(math.log(0.7 / 0.5), rel=1e-5)
    assert metrics["ratio_mean"].item() == pytest.approx(2, rel=1e-5)
    assert loss.item() == pytest.approx(2 * math.log(0.7 / 0.5), rel=1e-5)


def test_rows_of_a_chunk_read_their_own_targets() -> None:
    read = Targets(token_ids=torch.tensor([0, 1, 2]))
    loss, _ = row_loss(PRESETS["sft"].objective, read)(torch.tensor([[0.5, 0.3, 0.2]]).log(), slice(2, 3))
    assert loss.item() == pytest.approx(-math.log(0.2), rel=1e-5)


@pytest.mark.parametrize("missing", ["support_ids", "teacher_support", "teacher_rest"])
def test_a_missing_target_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match=f"reads targets.{missing}, which is missing"):
        row_loss(PRESETS["opd"].objective, opd_targets(**{missing: None}))


@pytest.mark.parametrize(("method", "missing"), [("opd_sampled", "behaviour"), ("opsd", "teacher_logits")])
def test_a_target_that_another_objective_reads_does_not_stand_in(method: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"reads targets.{missing}, which is missing"):
        row_loss(PRESETS[method].objective, opd_targets())


def test_a_target_that_is_nan_is_refused_by_name() -> None:
    with pytest.raises(NonFinite, match=r"targets\.teacher_support holds NaN"):
        row_loss(PRESETS["opd"].objective, opd_targets(teacher_support=torch.tensor([[0.0, math.nan]])))


def test_a_teacher_with_nothing_outside_the_support_is_welcome() -> None:
    read = opd_targets(teacher_rest=torch.tensor([-math.inf]))
    loss, _ = row_loss(PRESETS["gkd"].objective, read)(torch.zeros(1, 4), slice(0, 1))
    assert loss.isfinite()
