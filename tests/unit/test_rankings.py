"""Plackett-Luce against products over every permutation and loops over ranks; ULD's shape and its flaw."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from learner.rankings import plackett_luce, sorted_l1

OUTCOMES = 5


def random_logprobs(*, seed: int, rows: int = 3, outcomes: int = OUTCOMES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, outcomes, dtype=torch.float64, generator=generator)).log_softmax(-1)


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def falling(logp: Tensor) -> Tensor:
    return logp.argsort(dim=-1, descending=True)


def ranks_one_by_one(logq: list[float], order: list[int], weights: list[float]) -> float:
    """Σ_k w_k (log of the mass still to be drawn − log q of what is drawn)."""
    total = 0.0
    for rank, outcome in enumerate(order):
        left = math.fsum(math.exp(logq[later]) for later in order[rank:])
        total += weights[outcome] * (math.log(left) - logq[outcome])
    return total


@pytest.mark.parametrize("weighted", [False, True])
def test_values_are_the_sums_over_ranks(weighted: bool) -> None:
    logq, logp = random_logprobs(seed=1), random_logprobs(seed=2)
    order = falling(logp)
    found = plackett_luce(logq, logp, order, weighted=weighted)
    for row in range(len(logq)):
        weights = logp[row].exp().tolist() if weighted else [1.0] * OUTCOMES
        expected = ranks_one_by_one(logq[row].tolist(), order[row].tolist(), weights)
        assert found[row].item() == pytest.approx(expected, rel=1e-12)


def test_probabilities_of_all_orders_sum_to_one() -> None:
    logq = random_logprobs(seed=3, rows=1).squeeze(0)
    orders = torch.tensor(list(itertools.permutations(range(OUTCOMES))))
    every = logq.expand(len(orders), -1)
    total = plackett_luce(every, every, orders, weighted=False).neg().exp().sum()
    assert total.item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_order_costs_less_than_the_one_in_which_q_falls(weighted: bool) -> None:
    logq = random_logprobs(seed=4, rows=1).squeeze(0)
    orders = torch.tensor(list(itertools.permutations(range(OUTCOMES))))
    every = logq.expand(len(orders), -1)
    costs = plackett_luce(every, every, orders, weighted=weighted)
    assert torch.equal(orders[costs.argmin()], falling(logq))


def test_mass_is_what_is_still_to_be_drawn_and_not_what_is_drawn() -> None:
    logq, order = log(0.6, 0.3, 0.1), torch.tensor([0, 1, 2])
    suffix = -math.log(0.6) - math.log(0.3 / 0.4)
    assert plackett_luce(logq, logq, order, weighted=False).item() == pytest.approx(suffix, rel=1e-12)
    prefix = math.log(0.9 / 0.3) + math.log(1 / 0.1)
    assert plackett_luce(logq, logq, order, weighted=False).item() != pytest.approx(prefix, rel=0.1)


def test_weighted_ranking_of_two_outcomes_is_weighted_cross_entropy() -> None:
    logq, logp = log(0.2, 0.8), log(0.7, 0.3)
    found = plackett_luce(logq, logp, torch.tensor([0, 1]), weighted=True)
    assert found.item() == pytest.approx(-0.7 * math.log(0.2), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_constant_added_to_the_scores_changes_nothing(weighted: bool) -> None:
    logq, logp = random_logprobs(seed=5), random_logprobs(seed=6)
    order = falling(logp)
    shifted = plackett_luce(logq + 3.0, logp, order, weighted=weighted)
    torch.testing.assert_close(shifted, plackett_luce(logq, logp, order, weighted=weighted))


@pytest.mark.parametrize("weighted", [False, True])
def test_autograd_agrees_with_finite_differences(weighted: bool) -> None:
    logp = random_logprobs(seed=8)
    logq = random_logprobs(seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: plackett_luce(s, logp, falling(logp), weighted=weighted), (logq,))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("place", range(4))
def test_an_outcome_outside_the_support_changes_nothing_wherever_it_is_ranked(weighted: bool, place: int) -> None:
    logq, logp = log(0.2, 0.5, 0.1).requires_grad_(), log(0.3, 0.2, 0.5)
    order = falling(logp)
    never = torch.tensor([-math.inf]).double()
    wide_q = torch.cat([logq.detach(), never]).requires_grad_()
    wide_order = torch.tensor([*order[:place], 3, *order[place:]])
    narrow = plackett_luce(logq, logp, order, weighted=weighted)
    wide = plackett_luce(wide_q, torch.cat([logp, never]), wide_order, weighted=weighted)
    torch.testing.assert_close(wide, narrow)
    expected = torch.cat([torch.autograd.grad(narrow, logq)[0], torch.zeros(1)])
    torch.testing.assert_close(torch.autograd.grad(wide, wide_q)[0], expected)


def test_outcomes_that_the_teacher_alone_rules_out_are_only_waited_for() -> None:
    logq, logp = log(0.2, 0.5, 0.2, 0.1), log(0.6, 0.4, 0.0, 0.0)
    expected = -math.log(0.2) - math.log(0.5 / 0.8)
    assert plackett_luce(logq, logp, falling(logp), weighted=False).item() == pytest.approx(expected, rel=1e-12)


def test_sorted_l1_compares_shapes_and_pads_the_shorter_vocabulary() -> None:
    assert sorted_l1(log(0.1, 0.2, 0.7), log(0.5, 0.5)).item() == pytest.approx(0.2 + 0.3 + 0.1)
    assert sorted_l1(log(0.5, 0.5), log(0.1, 0.2, 0.7)).item() == pytest.approx(0.2 + 0.3 + 0.1)


def test_sorted_l1_does_not_see_a_permutation_whose_kl_is_far_from_zero() -> None:
    logp = log(0.7, 0.2, 0.1)
    logq = logp[[2, 0, 1]]
    assert sorted_l1(logq, logp) == 0
    assert (logp.exp() * (logp - logq)).sum() > 0.5


def test_sorted_l1_of_equal_distributions_has_no_gradient() -> None:
    z = random_logprobs(seed=9).requires_grad_()
    value = sorted_l1(z.log_softmax(-1), z.detach().log_softmax(-1))
    assert torch.equal(value, torch.zeros(3).double())
    assert torch.equal(torch.autograd.grad(value.sum(), z)[0], torch.zeros_like(z))


def test_sorted_l1_follows_finite_differences_and_ignores_what_is_outside_the_support() -> None:
    logp = random_logprobs(seed=10)
    z = random_logprobs(seed=11).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sorted_l1(z.log_softmax(-1), logp), (z,))
    never = torch.full((3, 1), -math.inf).double()
    wide = torch.cat([never, z.detach()], dim=-1).requires_grad_()
    value = sorted_l1(wide, torch.cat([never, logp], dim=-1))
    torch.testing.assert_close(value, sorted_l1(z.detach(), logp))
    assert torch.autograd.grad(value.sum(), wide)[0].isfinite().all()
