"""Factors for another policy's text: bounds, masks and products, and PPO's gradient against autodiff."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.corrections import sequence_factor, token_factor
from learner.estimators import policy_gradient
from learner.facts import Facts
from potstill.algebra.corrections import (
    Clipped,
    Correction,
    GeometricRejection,
    Ignored,
    Masked,
    Truncated,
    Unclipped,
)

TOKEN_LEVEL = [Unclipped(), Truncated(), Masked(), Clipped()]
SEQUENCE_LEVEL = [Truncated(level="sequence"), Masked(level="sequence"), GeometricRejection()]


def log(*ratios: float) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def by_token(correction: Correction, *ratios: float, advantage: Tensor | None = None) -> list[float]:
    return token_factor(correction, log(*ratios), advantage).tolist()


def facts(log_ratios: Tensor, *, lengths: tuple[int, ...]) -> Facts:
    ids = torch.zeros(len(log_ratios), dtype=torch.int64)
    behaviour = -1 - torch.rand(len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Facts(
        token_ids=ids,
        lengths=lengths,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        origin=ids,
        behaviour=behaviour,
        student=behaviour + log_ratios,
    )


def by_sequence(
    correction: Correction, *ratios: float, lengths: tuple[int, ...], read: list[int] | None = None
) -> list[float]:
    mask = torch.ones(len(ratios), dtype=torch.bool) if read is None else torch.tensor(read).bool()
    return sequence_factor(correction, facts(log(*ratios), lengths=lengths), mask).tolist()


# By token


def test_no_correction_is_one_whatever_the_ratio() -> None:
    assert by_token(Ignored(), 0.1, 1.0, 50.0) == [1.0, 1.0, 1.0]


def test_unclipped_is_the_ratio() -> None:
    assert by_token(Unclipped(), 0.1, 1.0, 50.0) == pytest.approx([0.1, 1.0, 50.0])


def test_truncation_caps_large_ratios_and_leaves_small_ones() -> None:
    assert by_token(Truncated(cap=2.0), 0.01, 1.9, 2.1, 50.0) == pytest.approx([0.01, 1.9, 2.0, 2.0])


def test_a_mask_keeps_ratios_inside_its_bounds_and_drops_the_others() -> None:
    assert by_token(Masked(low=0.5, high=2.0), 0.49, 0.51, 1.99, 2.01) == pytest.approx([0.0, 0.51, 1.99, 0.0])


def ppo(logq: Tensor, log_mu: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """As in arXiv 1707.06347, eq. 7, with a minus: autodiff finds its gradient."""
    ratio = (logq - log_mu).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.85, 1.0, 1.25, 3.0])
def test_clipped_has_the_gradient_of_ppo_on_either_side_and_for_either_sign(ratio: float, advantage: float) -> None:
    log_mu, advantages = torch.tensor([-2.0]).double(), torch.tensor([advantage]).double()
    logq = (log_mu + math.log(ratio)).requires_grad_()
    factor = token_factor(Clipped(low=0.2, high=0.3), logq - log_mu, advantages)
    (found,) = torch.autograd.grad((factor * policy_gradient(logq, advantages)).sum(), logq)
    (expected,) = torch.autograd.grad(ppo(logq, log_mu, advantages, low=0.2, high=0.3).sum(), logq)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    stopped = (ratio > 1.3 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert (found == 0).item() is stopped


def test_clipped_needs_an_advantage() -> None:
    with pytest.raises(ValueError, match="advantage"):
        by_token(Clipped(), 1.0)


def test_factors_of_draws_have_their_shape() -> None:
    log_ratio = log(0.5, 1.0, 2.0, 4.0, 8.0, 16.0).reshape(2, 3)
    for correction in [*TOKEN_LEVEL, *SEQUENCE_LEVEL, Ignored()]:
        assert token_factor(correction, log_ratio, torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("correction", TOKEN_LEVEL)
def test_no_factor_of_a_token_carries_gradient(correction: Correction) -> None:
    log_ratio = log(0.9, 1.1).requires_grad_()
    assert not token_factor(correction, log_ratio, torch.ones(2)).requires_grad


@pytest.mark.parametrize("correction", TOKEN_LEVEL)
def test_a_missing_sampler_is_never_masked_away(correction: Correction) -> None:
    assert token_factor(correction, torch.tensor([torch.nan]), torch.ones(1)).isnan().all()


def test_log_ratios_are_clamped_to_twenty_nats() -> None:
    found = token_factor(Unclipped(), torch.tensor([500.0, -500.0], dtype=torch.float64), None)
    assert found.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


# By completion


def test_the_product_runs_over_a_completions_tokens_and_is_the_same_for_all_of_them() -> None:
    found = by_sequence(Truncated(cap=5.0, level="sequence"), 1.5, 2.0, 0.5, 3.0, 4.0, lengths=(2, 1, 2))
    assert found == pytest.approx([3.0, 3.0, 0.5, 5.0, 5.0])


def test_a_masked_completion_counts_with_its_product_or_not_at_all() -> None:
    found = by_sequence(Masked(low=0.5, high=4.0, level="sequence"), 1.5, 2.0, 0.4, 3.0, 2.0, lengths=(2, 1, 2))
    assert found == pytest.approx([3.0, 3.0, 0.0, 0.0, 0.0])


def test_geometric_rejection_looks_at_the_mean_ratio_and_gives_no_ratio() -> None:
    choice = GeometricRejection(low=0.9, high=1.1)
    found = by_sequence(choice, 4.0, 0.25, 1.0, 1.2, 1.2, 0.89, 1.09, lengths=(3, 2, 1, 1))
    assert found == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_mean_ratio_is_of_one_token_however_long_the_completion() -> None:
    choice = GeometricRejection(low=0.9, high=1.1)
    assert by_sequence(choice, *[1.09] * 50, lengths=(50,)) == [1.0] * 50
    assert by_sequence(choice, *[1.11] * 50, lengths=(50,)) == [0.0] * 50
    assert by_sequence(choice, 1.0, 1.0, 1.11, lengths=(3,), read=[0, 0, 1]) == [0.0] * 3


@pytest.mark.parametrize("correction", SEQUENCE_LEVEL)
def test_only_tokens_that_are_read_enter_a_completions_factor(correction: Correction) -> None:
    """Holes are tool answers and tokens of other terms; what is there may be anything, NaN included."""
    with_holes = by_sequence(
        correction, 1.1, torch.nan, 1.2, 1e9, torch.nan, 1.0005, lengths=(4, 2), read=[1, 0, 1, 0, 0, 1]
    )
    without = by_sequence(correction, 1.1, 1.2, 1.0005, lengths=(2, 1))
    assert [with_holes[row] for row in (0, 2, 5)] == without
    assert all(map(math.isfinite, with_holes))


@pytest.mark.parametrize("correction", SEQUENCE_LEVEL)
def test_a_completion_that_is_not_read_has_a_finite_factor(correction: Correction) -> None:
    found = by_sequence(correction, torch.nan, torch.nan, 1.0, lengths=(2, 0, 1), read=[0, 0, 1])
    assert found == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("correction", SEQUENCE_LEVEL)
def test_a_missing_score_that_is_read_makes_its_completion_nan(correction: Correction) -> None:
    found = by_sequence(correction, torch.nan, 1.0, 1.0, lengths=(2, 1))
    assert [math.isnan(factor) for factor in found] == [True, True, False]


def test_a_product_is_clamped_to_twenty_nats_token_by_token_and_as_a_whole() -> None:
    read = torch.ones(5, dtype=torch.bool)
    log_ratios = torch.tensor([500.0, -15.0, 20.0, 20.0, 20.0], dtype=torch.float64)  # 20 − 15, and 60
    found = sequence_factor(Truncated(cap=1e30, level="sequence"), facts(log_ratios, lengths=(2, 3)), read)
    assert found.tolist() == pytest.approx([math.exp(5)] * 2 + [math.exp(20)] * 3)


def test_a_completion_too_long_for_exp_is_masked_and_not_nan() -> None:
    read = torch.ones(100, dtype=torch.bool)
    log_ratios = torch.full((100,), 19.0, dtype=torch.float64)
    found = sequence_factor(Masked(level="sequence"), facts(log_ratios, lengths=(100,)), read)
    assert found.tolist() == [0.0] * 100


def test_what_the_product_needs_is_named_when_it_is_missing() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    bare = Facts(token_ids=ids, lengths=(1,), positions=ids, origin=ids, behaviour=torch.zeros(1))
    with pytest.raises(ValueError, match=r"facts\.student"):
        sequence_factor(GeometricRejection(), bare, torch.ones(1, dtype=torch.bool))


# Both


@pytest.mark.parametrize("correction", [*TOKEN_LEVEL, *SEQUENCE_LEVEL, Ignored()])
def test_every_factor_is_one_where_the_sampler_is_the_student(correction: Correction) -> None:
    assert by_token(correction, 1.0, 1.0, advantage=torch.tensor([1.0, -1.0])) == [1.0, 1.0]
    assert by_sequence(correction, 1.0, 1.0, 1.0, lengths=(2, 1)) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("correction", [*TOKEN_LEVEL, *SEQUENCE_LEVEL])
def test_no_ratio_is_counted_twice(correction: Correction) -> None:
    """A correction acts by token or by completion; the other factor is 1 at a ratio that every kind would change."""
    token = by_token(correction, 50.0, advantage=torch.ones(1))
    sequence = by_sequence(correction, 50.0, lengths=(1,))
    assert (token == [1.0]) is not (sequence == [1.0])


@pytest.mark.parametrize("correction", [*TOKEN_LEVEL, Ignored()])
def test_a_correction_by_token_asks_for_no_look(correction: Correction) -> None:
    ids = torch.zeros(2, dtype=torch.int64)
    bare = Facts(token_ids=ids, lengths=(2,), positions=torch.arange(2), origin=ids)
    assert sequence_factor(correction, bare, torch.ones(2, dtype=torch.bool)).tolist() == [1.0, 1.0]
