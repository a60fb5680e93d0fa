"""Expected gradients of sampled losses, by enumerating every token that could have been sampled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learner import estimators
from learner.chunk import Chunk
from learner.corrections import token_factor
from learner.divergences import forward_kl, reverse_kl
from potstill.algebra.corrections import Correction, Ignored, Unclipped
from potstill.algebra.losses import PolicyGradient
from potstill.section import Ramp
from tests.small_logits import EXACT, NOW, V, completions, gradient, logits, logprobs

UNCLIPPED = Unclipped()


def gradient_of_reverse_kl(z: Tensor, logp: Tensor) -> Tensor:
    return gradient(lambda z: reverse_kl(z.log_softmax(-1), logp), z)


def expected_gradient(loss: Callable[[Tensor], Tensor], z: Tensor, log_mu: Tensor) -> Tensor:
    """Σ_a μ(a) ∂loss(a)/∂z: `loss` takes log q of all tokens at once, as if each had been sampled."""
    return gradient(lambda z: (log_mu.exp() * loss(z.log_softmax(-1))).sum(), z)


def every_token(z: Tensor, **facts: Any) -> Chunk:
    """A chunk of V completions of one token each: every token that could have been written at one position."""
    return Chunk(z.expand(V, V), torch.arange(V), completions(*(1,) * V, token_ids=torch.arange(V), **facts))


def logits_of(logp: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: logp.expand(len(rows), V)


def expected_policy_gradient(
    choice: PolicyGradient, z: Tensor, log_mu: Tensor, logp: Tensor, correction: Correction = UNCLIPPED, **facts: Tensor
) -> Tensor:
    """Over every token, as learner/terms.py puts the parts together."""

    def loss(z: Tensor) -> Tensor:
        chunk = every_token(z, teacher=logp, teacher_logits=logits_of(logp), behaviour=log_mu, **facts)
        advantage = estimators.advantage(choice, chunk, moment=NOW)
        factor = token_factor(correction, chunk.written - log_mu, advantage)
        return (log_mu.exp() * factor * estimators.policy_gradient(chunk.written, advantage)).sum()

    return gradient(loss, z)


# One token


def test_negative_log_likelihood_is_minus_log_q() -> None:
    assert estimators.negative_log_likelihood(torch.tensor([-0.25, -3.0])).tolist() == [0.25, 3.0]


def test_a_policy_gradients_value_is_minus_the_advantage_and_only_the_student_has_a_gradient() -> None:
    logq = torch.tensor([-0.5, -2.0], requires_grad=True)
    advantage = torch.tensor([3.0, -0.25], requires_grad=True)
    loss = estimators.policy_gradient(logq, advantage)
    of_logq, of_advantage = torch.autograd.grad(loss.sum(), (logq, advantage), allow_unused=True)
    assert loss.tolist() == of_logq.tolist() == [-3.0, 0.25]
    assert of_advantage is None


@pytest.mark.parametrize("seed", range(3))
def test_the_policy_gradient_of_the_current_students_advantage_is_the_reverse_kl_whoever_sampled(seed: int) -> None:
    z, logp, log_mu = logits(seed=seed), logprobs(seed=seed + 100), logprobs(seed=seed + 200)
    found = expected_policy_gradient(PolicyGradient(), z, log_mu, logp)
    torch.testing.assert_close(found, gradient_of_reverse_kl(z, logp), **EXACT)


def test_without_the_ratio_a_stale_sampler_biases_it() -> None:
    z, logp, log_mu = logits(seed=1), logprobs(seed=2), logprobs(seed=3)
    found = expected_policy_gradient(PolicyGradient(), z, log_mu, logp, Ignored())
    assert (found - gradient_of_reverse_kl(z, logp)).abs().max() > 0.05


def test_with_the_samplers_log_prob_in_the_advantage_it_is_the_reverse_kl_only_on_policy() -> None:
    choice = PolicyGradient(student="sampler")
    z, logp, stale = logits(seed=1), logprobs(seed=2), logprobs(seed=3)
    exact = gradient_of_reverse_kl(z, logp)
    assert (expected_policy_gradient(choice, z, stale, logp) - exact).abs().max() > 0.05
    torch.testing.assert_close(expected_policy_gradient(choice, z, z.log_softmax(-1), logp), exact, **EXACT)


def test_differentiating_the_k1_estimate_itself_would_not_learn() -> None:
    """Why there is no such loss: log q − log p has the right value and a gradient of zero mean."""
    z, logp = logits(seed=4), logprobs(seed=5)
    found = expected_gradient(lambda logq: logq - logp, z, z.log_softmax(-1))
    assert found.abs().max() < 1e-15
    assert gradient_of_reverse_kl(z, logp).abs().max() > 0.05


def test_k2_is_the_reverse_kl_on_policy_and_with_a_ratio_for_any_sampler() -> None:
    z, logp, stale = logits(seed=6), logprobs(seed=7), logprobs(seed=8)
    exact = gradient_of_reverse_kl(z, logp)

    def corrected(logq: Tensor) -> Tensor:
        return token_factor(UNCLIPPED, logq - stale, None) * estimators.k2(logq, logp)

    on_policy = expected_gradient(lambda logq: estimators.k2(logq, logp), z, z.log_softmax(-1))
    torch.testing.assert_close(on_policy, exact, **EXACT)
    torch.testing.assert_close(expected_gradient(corrected, z, stale), exact, **EXACT)
    assert (expected_gradient(lambda logq: estimators.k2(logq, logp), z, stale) - exact).abs().max() > 0.05


def test_k3_without_the_ratio_would_be_the_forward_kl() -> None:
    """Why there is no such loss."""
    z, logp = logits(seed=9), logprobs(seed=10)
    found = expected_gradient(lambda logq: (logp - logq).exp() - 1 - (logp - logq), z, z.log_softmax(-1))
    forward = gradient(lambda z: forward_kl(z.log_softmax(-1), logp, pointwise_clip=None, zero_sum=False), z)
    torch.testing.assert_close(found, forward, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_k3_with_the_ratio_is_the_reverse_kl_whoever_sampled(seed: int) -> None:
    z, logp, log_mu = logits(seed=seed), logprobs(seed=seed + 10), logprobs(seed=seed + 20)
    found = expected_gradient(lambda logq: estimators.ratio_k3(logq, logp, log_mu, clamp=20.0), z, log_mu)
    torch.testing.assert_close(found, gradient_of_reverse_kl(z, logp), **EXACT)


def test_k3_with_the_ratio_has_the_value_and_gradient_of_the_formula_left_to_autodiff() -> None:
    logq, logp, log_mu = logits(seed=1), logits(seed=2), logits(seed=3)

    def formula(logq: Tensor) -> Tensor:
        return ((logq - log_mu).exp() * ((logp - logq).exp() - 1 - (logp - logq))).sum()

    def ours(logq: Tensor) -> Tensor:
        return estimators.ratio_k3(logq, logp, log_mu, clamp=20.0).sum()

    torch.testing.assert_close(ours(logq), formula(logq))
    torch.testing.assert_close(gradient(ours, logq), gradient(formula, logq))


def test_a_clamped_k3_still_pulls_towards_a_teacher_far_away_and_no_harder_than_the_clamp() -> None:
    logq, logp = torch.tensor([-40.0, -1.0]), torch.tensor([-1.0, -40.0])  # float32, where e^20 leaves no digit of 20
    loss = estimators.ratio_k3(logq, logp, logq, clamp=20.0)
    torch.testing.assert_close(loss, torch.tensor([math.exp(20) - 21, math.exp(-20) + 19]))
    found = gradient(lambda z: estimators.ratio_k3(z, logp, logq, clamp=20.0).sum(), logq)
    assert found.tolist() == [-20.0, 20.0]


# The advantage


def test_the_kl_baseline_leaves_the_expected_gradient_and_centres_the_advantage() -> None:
    z, logp, stale = logits(seed=11), logprobs(seed=12), logprobs(seed=13)
    choice = PolicyGradient(baseline="kl", distil=0.5)
    found = expected_policy_gradient(choice, z, stale, logp)
    torch.testing.assert_close(found, 0.5 * gradient_of_reverse_kl(z, logp), **EXACT)
    chunk = every_token(z, teacher=logp, teacher_logits=logits_of(logp))
    advantage = estimators.advantage(choice, chunk, moment=NOW)
    assert abs((z.softmax(-1) * advantage).sum()) < 1e-15


@pytest.mark.parametrize("extrapolation", [0.0, 0.3, 1.0, 1.25])
def test_extrapolation_rests_where_the_student_is_the_geometric_mixture_and_only_there(extrapolation: float) -> None:
    logp, reference, stale = logprobs(seed=2), logprobs(seed=3), logprobs(seed=4)
    choice = PolicyGradient(extrapolation=extrapolation)
    mixture = (1 - extrapolation) * reference + extrapolation * logp  # logits of ref^(1−λ) p^λ
    at_rest = expected_policy_gradient(choice, mixture, stale, logp, reference=reference)
    assert at_rest.abs().max() < 1e-14
    elsewhere = expected_policy_gradient(choice, logits(seed=5), stale, logp, reference=reference)
    torch.testing.assert_close(elsewhere, gradient_of_reverse_kl(logits(seed=5), mixture.log_softmax(-1)))


def test_the_power_score_lies_between_minus_one_and_one_and_is_zero_where_the_student_agrees() -> None:
    choice = PolicyGradient(score="power", exponent=3.0)
    z, logp = 300 * logits(seed=1), (300 * logits(seed=2)).log_softmax(-1)
    found = estimators.advantage(choice, every_token(z, teacher=logp), moment=NOW)
    torch.testing.assert_close(found, logp.exp() ** 3 - z.softmax(-1) ** 3)
    assert found.abs().max() <= 1
    assert found.min() < -0.9
    assert found.max() > 0.9
    assert not estimators.advantage(choice, every_token(z, teacher=z.log_softmax(-1)), moment=NOW).any()


def test_the_power_score_refuses_an_extrapolation() -> None:
    chunk = every_token(logits(seed=1), teacher=logits(seed=2), reference=logits(seed=3))
    with pytest.raises(ValueError, match="extrapolation"):
        estimators.advantage(PolicyGradient(score="power", extrapolation=2.0), chunk, moment=NOW)


def test_the_reward_is_divided_by_its_groups_deviation_only_when_asked() -> None:
    reward, deviation = torch.tensor([0.5, -0.5, 0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.0, 0.0, 2.0])
    chunk = every_token(logits(seed=1), reward=reward, reward_deviation=deviation)  # no teacher: it is not read
    by_mean = estimators.advantage(PolicyGradient(distil=0.0, reward=2.0, normalise="mean"), chunk, moment=NOW)
    assert by_mean.tolist() == [1.0, -1.0, 0.0, 0.0, 2.0]
    by_std = estimators.advantage(PolicyGradient(distil=0.0, reward=2.0), chunk, moment=NOW)
    torch.testing.assert_close(by_std, torch.tensor([2.0, -2.0, 0.0, 0.0, 1.0]).double(), rtol=1e-5, atol=0)


def test_the_teachers_part_and_the_reward_add_up_with_their_weights_at_the_step() -> None:
    z, logp, reward = logits(seed=1), logprobs(seed=2), logits(seed=3)
    choice = PolicyGradient(distil=0.25, reward=Ramp(start=0.0, end=4.0, from_step=1, to_step=5), normalise="mean")
    chunk = every_token(z, teacher=logp, reward=reward)
    distilled = 0.25 * (logp - z.log_softmax(-1))
    torch.testing.assert_close(estimators.advantage(choice, chunk, moment=NOW), distilled)
    torch.testing.assert_close(
        estimators.advantage(choice, chunk, moment=dataclasses.replace(NOW, step=3)), distilled + 2.0 * reward
    )


def test_the_advantage_has_no_gradient_and_leaves_the_chunks_log_probs_theirs() -> None:
    z, logp = logits(seed=1).requires_grad_(), logprobs(seed=2)
    chunk = every_token(z, teacher=logp, teacher_logits=logits_of(logp))
    assert not estimators.advantage(PolicyGradient(baseline="kl"), chunk, moment=NOW).requires_grad
    assert chunk.written.requires_grad
    assert chunk.logq.requires_grad


# Several draws at a position


def mean_and_variance(num_draws: int, z: Tensor, log_mu: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Of the gradient [V], over every tuple of tokens that the draws can be."""
    draws = torch.tensor(list(itertools.product(range(V), repeat=num_draws)))  # [V^m, m]

    def loss(z: Tensor) -> Tensor:
        sampled = z.log_softmax(-1)[draws], logp[draws], log_mu[draws]
        return estimators.sampled_actions(
            *sampled, scale=1.0, factor=lambda ratio, a: token_factor(UNCLIPPED, ratio, a)
        )

    probability, each = log_mu[draws].sum(-1).exp(), torch.autograd.functional.jacobian(loss, z)
    mean = probability @ each
    return mean, probability @ (each - mean).square()


@pytest.mark.parametrize("num_draws", [1, 2, 4])
def test_draws_are_unbiased_for_any_sampler_and_their_variance_is_one_over_their_number(num_draws: int) -> None:
    z, log_mu, logp = logits(seed=1), logprobs(seed=2), logprobs(seed=3)
    mean, variance = mean_and_variance(num_draws, z, log_mu, logp)
    torch.testing.assert_close(mean, gradient_of_reverse_kl(z, logp), **EXACT)
    _, variance_of_one = mean_and_variance(1, z, log_mu, logp)
    torch.testing.assert_close(variance, variance_of_one / num_draws, **EXACT)


def test_draws_are_scaled_and_each_has_its_own_factor_and_advantage() -> None:
    logq, logp, log_mu = (logits(seed=seed, shape=(2, 3)) for seed in (1, 2, 3))

    def factor(log_ratio: Tensor, advantage: Tensor) -> Tensor:
        torch.testing.assert_close(log_ratio, logq - log_mu)
        torch.testing.assert_close(advantage, 0.5 * (logp - logq))
        return torch.tensor([1.0, 0.0, 2.0]).double()

    found = estimators.sampled_actions(logq, logp, log_mu, scale=0.5, factor=factor)
    first, _, third = (0.5 * (logp - logq)).unbind(-1)
    torch.testing.assert_close(found, -(first + 2 * third) / 3)
