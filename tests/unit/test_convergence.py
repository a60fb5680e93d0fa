"""Where descent ends: a tabular policy, trained by the real objective, reaches the optimum that theory names.

A table of logits [states, V] in float64 and Adam; the gradient is that of tests/golden.evaluate. Expectations over
what the student writes are exact: a row for every (state, token), a uniform sampler, and the ratio q / μ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.facts import Facts
from learner.schedules import Schedules
from learner.supports import log_outside
from potstill.algebra.objective import Objective
from tests.golden import distribution, evaluate, make_facts

STATES, VOCABULARY = 2, 6
TEACHER = torch.tensor([[2.0, -1.0, 0.5, 0.0, -2.0, 1.0], [-0.5, 1.5, 0.0, -1.0, 0.7, 0.2]], dtype=torch.float64)
REFERENCE = torch.tensor([[0.3, 0.8, -0.4, 1.2, 0.0, -0.7], [1.0, -0.2, 0.6, 0.1, -1.1, 0.4]], dtype=torch.float64)
P, REF = TEACHER.softmax(-1), REFERENCE.softmax(-1)
START = torch.tensor([[-0.6, 0.9, 0.1, 0.5, -0.2, -0.8], [0.4, -0.9, 0.7, 0.3, 0.0, -0.5]], dtype=torch.float64)
SUPPORT = torch.tensor([[0, 2, 4], [1, 5, 0]])  # holds 0.63 and 0.63 of the teacher's mass
SAMPLER = torch.full((STATES * VOCABULARY,), -math.log(VOCABULARY), dtype=torch.float64)

Gradient = Callable[[int, Tensor], Tensor]
"""(step, counted from 1; parameters) → gradient with respect to them."""


def made(**choices: Any) -> Objective:
    return Objective.model_validate({"support": "full", **choices})


def estimate(**choices: Any) -> Objective:
    """Of sampled tokens, each with its exact ratio."""
    return made(**{"support": "sampled", "over": "student", "correction": "unclipped", **choices})


def descend(gradient: Gradient, start: Tensor, *, steps: int = 150, lr: float = 0.3) -> Tensor:
    """Parameters after Adam, whose steps shrink to nothing."""
    found = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([found], lr=lr, betas=(0.8, 0.9))
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps) ** 2
        found.grad = gradient(step, found.detach())
        optimizer.step()
    return found.detach()


def of_states(objective: Objective, facts: Facts, **moment: Any) -> Gradient:
    """One row for every state: losses that read distributions."""
    return lambda step, table: evaluate(objective, table, facts, chunk_tokens=STATES, **moment)[1]


def of_all_tokens(objective: Objective, facts: Facts) -> Gradient:
    """One row for every token of every state: losses that read what was written."""

    def gradient(step: int, table: Tensor) -> Tensor:
        rows = table.repeat_interleave(VOCABULARY, 0)
        return evaluate(objective, rows, facts, chunk_tokens=len(rows))[1].view(STATES, VOCABULARY, -1).sum(1)

    return gradient


def visited(**fields: Any) -> Facts:
    """Every state once, with the teacher inside the learner unless fields say otherwise."""
    return make_facts([STATES], token_ids=[0] * STATES, **(fields or distribution(TEACHER)))


def enumerated(**fields: Any) -> Facts:
    """Every token of every state, once each; tensors are [states, V] and of the token that is written."""
    tokens = list(range(VOCABULARY)) * STATES
    spread = {name: value.flatten() if isinstance(value, Tensor) else value for name, value in fields.items()}
    return make_facts([1] * len(tokens), token_ids=tokens, behaviour=SAMPLER, **spread)


def looked_up(ids: Tensor) -> dict[str, Tensor]:
    """What a teacher behind HTTP says of a fixed support."""
    kept = P.log().gather(-1, ids)
    return {"support_ids": ids, "teacher_support": kept, "teacher_rest": log_outside(P.log(), ids)}


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def check_close(found: Tensor, expected: Tensor, *, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# A family that holds every distribution.

DIVERGENCES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"loss": "reverse_kl"},
    "forward_kl": {"loss": "forward_kl"},
    "jsd 0": {"loss": {"kind": "jsd", "beta": 0.0}},
    "jsd 0.5": {"loss": {"kind": "jsd", "beta": 0.5}},
    "jsd 0.9": {"loss": {"kind": "jsd", "beta": 0.9}},
    "jsd 1": {"loss": {"kind": "jsd", "beta": 1.0}},
    "skew_forward_kl": {"loss": {"kind": "skew_forward_kl", "alpha": 0.1}},
    "skew_reverse_kl": {"loss": {"kind": "skew_reverse_kl", "alpha": 0.1}},
    "skew_reverse_kl, mixture detached": {"loss": {"kind": "skew_reverse_kl", "alpha": 0.1, "detach_mixture": True}},
    "balanced_kl": {"loss": "balanced_kl"},
    "both at T = 2": {
        "loss": "forward_kl",
        "target": {"kind": "tempered", "student": 2.0, "teacher": 2.0, "times_square": True},
    },
}


@pytest.mark.parametrize("choices", DIVERGENCES.values(), ids=DIVERGENCES)
def test_every_divergence_ends_at_the_teacher(choices: dict[str, Any]) -> None:
    table = descend(of_states(made(**choices), visited()), START)
    check_close(table.softmax(-1), P)


def test_a_teacher_at_another_temperature_is_the_optimum_at_that_temperature() -> None:
    objective = made(loss="forward_kl", target={"kind": "tempered", "student": 1.0, "teacher": 2.0})
    check_close(descend(of_states(objective, visited()), START).softmax(-1), normalised(P**0.5))


def test_a_written_token_in_the_target_draws_its_share_of_the_optimum() -> None:
    """The data is uniform here: a share of 0.7 of the teacher leaves 0.3 of it."""
    objective = made(loss="forward_kl", target={"kind": "one_hot_mix", "share": 0.7})
    facts = enumerated(**distribution(TEACHER.repeat_interleave(VOCABULARY, 0)))
    check_close(descend(of_all_tokens(objective, facts), START).softmax(-1), 0.7 * P + 0.3 / VOCABULARY)


# A family that holds one bump: a mean and a width on a line of 21 tokens, and a teacher with two.

LINE = torch.arange(21, dtype=torch.float64)
HUMPS = normalised(torch.stack([torch.exp(-((LINE - centre) ** 2) / 2 / 1.3**2) for centre in (5, 15)]))
WEIGHTS = torch.tensor([0.6, 0.4], dtype=torch.float64)
BIMODAL = (WEIGHTS[:, None] * HUMPS).sum(0)


def bump(parameters: Tensor) -> Tensor:
    """[21] logits of a discretised Gaussian from its mean and the log of its deviation."""
    mean, log_deviation = parameters
    return -((LINE - mean) ** 2) / 2 / (2 * log_deviation).exp()


def fitted(objective: Objective, facts: Facts, *, mean: float) -> Tensor:
    """Probabilities [21] at which descent of both parameters ends, from a deviation of 1.6."""

    def gradient(step: int, parameters: Tensor) -> Tensor:
        free = parameters.clone().requires_grad_()
        logits = bump(free)
        rows = logits.detach().expand(len(facts.token_ids), -1)
        by_rows = evaluate(objective, rows, facts, chunk_tokens=len(rows))[1]
        return torch.autograd.grad(logits, free, by_rows.sum(0))[0]

    return bump(descend(gradient, torch.tensor([mean, 0.5], dtype=torch.float64))).softmax(-1)


def exactly(loss: Any, *, mean: float) -> Tensor:
    """The fit of a divergence over the whole line."""
    return fitted(made(loss=loss), make_facts([1], token_ids=[0], **distribution(BIMODAL.log()[None])), mean=mean)


@pytest.mark.parametrize(("mean", "mode"), [(7.0, 0), (13.0, 1)])
def test_a_reverse_kl_seeks_the_nearer_mode_and_leaves_the_other(mean: float, mode: int) -> None:
    q = exactly("reverse_kl", mean=mean)
    check_close(q, HUMPS[mode], atol=1e-3)
    left = (q * (q.log() - BIMODAL.log())).sum().item()
    assert left == pytest.approx(-WEIGHTS[mode].log().item(), abs=1e-3)  # it pays for what the mode does not hold


@pytest.mark.parametrize("mean", [7.0, 13.0])
def test_a_forward_kl_covers_both_modes_with_the_teachers_mean_and_variance(mean: float) -> None:
    q = exactly("forward_kl", mean=mean)
    for power in (1, 2):
        assert (q @ LINE**power).item() == pytest.approx((BIMODAL @ LINE**power).item(), rel=1e-3)
    assert q[9:12].sum() > 20 * BIMODAL[9:12].sum()  # most likely where the teacher hardly ever is


@pytest.mark.parametrize(("beta", "covers"), [(0.02, True), (0.98, False)])
def test_a_jsd_covers_or_seeks_as_beta_says(beta: float, covers: bool) -> None:
    """The side of the forward KL is β near 0."""
    q = exactly({"kind": "jsd", "beta": beta}, mean=7.0)
    assert (q[10:].sum() > 0.2) == covers


# Estimates from sampled tokens, in exact expectation.

ESTIMATES: dict[str, dict[str, Any]] = {
    "policy_gradient": {"loss": "policy_gradient"},
    "power score": {"loss": {"kind": "policy_gradient", "score": "power", "exponent": 1.0}},
    "k2": {"loss": "k2"},
    "ratio_k3": {"loss": "ratio_k3", "correction": "ignored"},
}


@pytest.mark.parametrize("choices", ESTIMATES.values(), ids=ESTIMATES)
def test_every_estimate_ends_at_the_teacher(choices: dict[str, Any]) -> None:
    table = descend(of_all_tokens(estimate(**choices), enumerated(teacher=P.log())), START)
    check_close(table.softmax(-1), P)


@pytest.mark.parametrize("loss", ["policy_gradient", "k2"])
def test_on_policy_no_ratio_is_needed(loss: str) -> None:
    """Tokens as frequent as the student writes them now: a weight V · q of each stands for how often it is there."""
    objective = estimate(loss=loss, correction="ignored", gates=["pass_rate"])

    def gradient(step: int, table: Tensor) -> Tensor:
        frequent = VOCABULARY * table.softmax(-1)
        return of_all_tokens(objective, enumerated(teacher=P.log(), pass_rate_weight=frequent))(step, table)

    check_close(descend(gradient, START).softmax(-1), P)


def test_several_draws_at_a_state_end_at_the_teacher_whoever_drew_them() -> None:
    everything = torch.arange(VOCABULARY).expand(STATES, -1)
    drawn = {"sample_behaviour": SAMPLER.view(STATES, VOCABULARY), "sample_teacher": P.log()}
    facts = visited(sample_ids=everything, teacher=P.log()[:, 0], behaviour=SAMPLER[:STATES], **drawn)
    objective = estimate(support={"kind": "samples", "m": VOCABULARY}, loss="policy_gradient")
    check_close(descend(of_states(objective, facts), START).softmax(-1), P)


def test_a_baseline_moves_no_optimum() -> None:
    objective = estimate(loss={"kind": "policy_gradient", "baseline": "kl"})
    facts = enumerated(teacher=P.log(), **distribution(TEACHER.repeat_interleave(VOCABULARY, 0)))
    check_close(descend(of_all_tokens(objective, facts), START).softmax(-1), P)


@pytest.mark.parametrize("extrapolation", [0.5, 1.25])
def test_g_opd_ends_at_the_geometric_mixture_of_reference_and_teacher(extrapolation: float) -> None:
    objective = estimate(loss={"kind": "policy_gradient", "extrapolation": extrapolation})
    table = descend(of_all_tokens(objective, enumerated(teacher=P.log(), reference=REF.log())), START)
    check_close(table.softmax(-1), normalised(REF ** (1 - extrapolation) * P**extrapolation))


def test_a_reward_beside_the_teacher_tilts_the_optimum_by_its_exponential() -> None:
    """max E[r] − KL(q ‖ p) ends at p · e^r."""
    reward = torch.linspace(-1, 1, STATES * VOCABULARY, dtype=torch.float64).view(STATES, VOCABULARY)
    objective = estimate(loss={"kind": "policy_gradient", "reward": 1.0, "normalise": "mean"})
    table = descend(of_all_tokens(objective, enumerated(teacher=P.log(), reward=reward)), START)
    check_close(table.softmax(-1), normalised(P * reward.exp()))


def test_an_anchor_to_the_reference_shares_the_optimum_by_its_weight() -> None:
    """KL(q‖p) + w KL(q‖ref) ends at (p · ref^w)^(1 / (1 + w))."""
    anchor = {"support": "sampled", "over": "student", "against": "reference", "loss": "ratio_k3", "weight": 0.5}
    objective = estimate(loss="policy_gradient", auxiliaries={"anchor": anchor})
    table = descend(of_all_tokens(objective, enumerated(teacher=P.log(), reference=REF.log())), START)
    check_close(table.softmax(-1), normalised((P * REF**0.5) ** (1 / 1.5)))


def test_the_samplers_log_probs_in_the_advantage_end_at_one_token_once_the_text_is_stale() -> None:
    """The cookbook's advantage: with a fixed sampler it lacks the entropy, and only the best of p / μ is left."""
    objective = estimate(loss={"kind": "policy_gradient", "student": "sampler"})
    q = descend(of_all_tokens(objective, enumerated(teacher=P.log())), START).softmax(-1)
    assert q.argmax(-1).tolist() == P.argmax(-1).tolist()
    assert q.max(-1).values.min() > 0.99


@pytest.mark.parametrize("loss", ["policy_gradient", "k2"])
def test_a_restricted_family_needs_the_ratio_to_end_where_the_reverse_kl_does(loss: str) -> None:
    """A table hides its absence: at q = p every log-ratio is 0, whoever wrote the text."""
    without = descend(of_all_tokens(estimate(loss=loss, correction="ignored"), enumerated(teacher=P.log())), START)
    check_close(without.softmax(-1), P)
    facts = make_facts(
        [1] * 21, token_ids=list(range(21)), teacher=BIMODAL.log(), behaviour=torch.full_like(BIMODAL, 1 / 21).log()
    )
    expected = exactly("reverse_kl", mean=7.0)
    check_close(fitted(estimate(loss=loss), facts, mean=7.0), expected)
    biased = fitted(estimate(loss=loss, correction="ignored"), facts, mean=7.0)
    assert (biased - expected).abs().max() > 0.05


# A truncated support, fixed.


def on_support(loss: str, rest: str, start: Tensor, *, steps: int = 150) -> Tensor:
    """Probabilities of the ids of SUPPORT at which descent ends."""
    objective = made(support={"kind": "student_topk", "k": 3, "rest": rest}, loss=loss)
    table = descend(of_states(objective, visited(**looked_up(SUPPORT))), start, steps=steps)
    return table.softmax(-1).gather(-1, SUPPORT)


P_SUPPORT = P.gather(-1, SUPPORT)
BOTH_WAYS = pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])


@BOTH_WAYS
def test_a_tail_bucket_learns_the_support_and_in_sum_what_lies_outside(loss: str) -> None:
    found = on_support(loss, "tail", START)
    check_close(found, P_SUPPORT)
    check_close(1 - found.sum(-1), 1 - P_SUPPORT.sum(-1))


def test_within_the_bucket_nothing_is_learnt() -> None:
    """Tokens outside the support keep their proportions under plain gradient descent."""
    objective = made(support={"kind": "student_topk", "k": 3}, loss="reverse_kl")
    gradient = of_states(objective, visited(**looked_up(SUPPORT)))(1, START)
    outside = torch.ones_like(START).scatter(-1, SUPPORT, 0.0).bool()
    pull = (gradient / START.softmax(-1))[outside].view(STATES, -1)
    check_close(pull, pull[:, :1].expand_as(pull), atol=1e-12)
    assert pull.abs().min() > 1e-3


@BOTH_WAYS
def test_renormalised_the_mass_outside_stays_where_it_happened_to_be(loss: str) -> None:
    masses = []
    for start in (START, START.scatter(-1, SUPPORT, -2.0)):
        found = on_support(loss, "renorm", start)
        check_close(normalised(found), normalised(P_SUPPORT))
        masses.append(found.sum(-1))
    assert (masses[0] - masses[1]).min() > 0.2


def test_left_out_a_forward_kl_drives_the_rest_to_nothing() -> None:
    check_close(on_support("forward_kl", "partial", START, steps=400), normalised(P_SUPPORT), atol=1e-3)


def test_left_out_a_reverse_kl_keeps_one_e_th_of_the_teachers_mass() -> None:
    check_close(on_support("reverse_kl", "partial", START), P_SUPPORT / math.e)


@pytest.mark.parametrize("kind", ["student_topk", "teacher_topk", "union_topk"])
def test_a_support_that_follows_the_student_ends_at_the_teacher_on_what_it_holds(kind: str) -> None:
    """The teacher is inside the learner: ids are chosen anew at every step."""
    objective = made(support={"kind": kind, "k": 4}, loss="reverse_kl")
    q = descend(of_states(objective, visited()), START).softmax(-1)
    top = P.topk(4).indices
    check_close(q.gather(-1, top), P.gather(-1, top), atol=1e-4)


# Objectives with a memory, or with pairs.


def test_taid_ends_at_the_teacher_while_its_schedule_rises_to_one() -> None:
    steps = 300
    objective = made(loss="forward_kl", target={"kind": "taid", "start": 0.2, "rate": 0.01})
    schedules, facts, seen = Schedules(objective, steps=steps), visited(), []

    def gradient(step: int, table: Tensor) -> Tensor:
        seen.append(schedules.values()["main"])
        loss, found, _ = evaluate(objective, table, facts, step=step, steps=steps, schedule=schedules.values())
        schedules.observe(step, {"main": loss})
        return found

    check_close(descend(gradient, START, steps=steps).softmax(-1), P)
    assert seen == sorted(seen)
    assert (seen[0], schedules.values()["main"]) == (0.2, 1.0)
    assert seen[steps // 2] > 0.2 + 0.8 / 2 + 0.01  # ahead of the straight line: the loss fell


def test_taid_asks_for_less_at_first_than_the_teacher_does() -> None:
    objective, facts = made(loss="forward_kl", target="taid"), visited()
    asked = [evaluate(objective, START, facts, schedule={"main": t})[0] for t in (0.1, 0.4, 0.7, 1.0)]
    assert asked == sorted(asked)
    assert asked[-1] == pytest.approx((P * (P.log() - START.log_softmax(-1))).sum(-1).mean().item())


def test_a_preference_raises_the_chosen_text_and_lowers_the_rejected_one() -> None:
    """Two tokens each, of which the first is the same: the pair teaches where the texts part."""
    chosen, rejected = [2, 3], [2, 1]
    facts = make_facts(
        [2, 2],
        token_ids=[*chosen, *rejected],
        origins=["others", "student"],
        prompts=("a", "a"),
        reference=REF.log()[[0, 1, 0, 1], [*chosen, *rejected]],
    )
    objective = made(support="sampled", loss={"kind": "preference", "beta": 0.5}, aggregation="sequence_sum")
    losses = []

    def gradient(step: int, table: Tensor) -> Tensor:
        loss, found, _ = evaluate(objective, table.repeat(2, 1), facts)
        losses.append(loss)
        return found.view(2, STATES, VOCABULARY).sum(0)

    table = descend(gradient, REFERENCE, steps=60)
    moved = table.log_softmax(-1) - REF.log()
    assert losses[0] == pytest.approx(math.log(2), rel=1e-12)
    assert losses[-1] < 0.1
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert moved[1, chosen[1]] > 1 > -1 > moved[1, rejected[1]]
    check_close(moved[0], torch.zeros(VOCABULARY, dtype=torch.float64), atol=1e-12)


def test_standardised_logits_end_at_the_teachers_shape_and_forget_its_scale() -> None:
    objective = made(loss="forward_kl", target={"kind": "standardised", "temperature": 2.0})
    found = []
    for start in (START, 3 * START):
        table = descend(of_states(objective, visited()), start)
        check_close(z_scores(table), z_scores(TEACHER), atol=1e-4)
        found.append(table.std(-1))
    assert (found[1] - found[0]).min() > 0.1


def z_scores(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)
