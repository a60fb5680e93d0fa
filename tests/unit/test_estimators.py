"""The sampled estimator's expected gradient, by enumerating every token that could have been sampled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.divergences import reverse_kl
from learner.estimators import negative_log_likelihood, sampled_reverse_kl


def random_logits(*, seed: int, outcomes: int = 7) -> Tensor:
    return torch.randn(outcomes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected_gradient(loss: Callable[[Tensor], Tensor], z: Tensor, behaviour: Tensor) -> Tensor:
    """Σ_a μ(a) ∂loss(a)/∂z: `loss` takes log q of all tokens at once, as if each had been sampled."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad((behaviour * loss(z.log_softmax(-1))).sum(), z)[0]


def gradient_of_reverse_kl(z: Tensor, logp: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(reverse_kl(z.log_softmax(-1), logp), z)[0]


@pytest.mark.parametrize("seed", range(5))
def test_expected_gradient_is_that_of_the_reverse_kl_whoever_sampled(seed: int) -> None:
    z, logp = random_logits(seed=seed), random_logits(seed=seed + 100).log_softmax(-1)
    log_mu = random_logits(seed=seed + 200).log_softmax(-1)
    found = expected_gradient(
        lambda logq: sampled_reverse_kl(logq, logp, log_mu, ratio_cap=None), z, behaviour=log_mu.exp()
    )
    torch.testing.assert_close(found, gradient_of_reverse_kl(z, logp), rtol=1e-12, atol=1e-14)


def test_an_advantage_under_the_stale_sampler_would_be_biased() -> None:
    """Why the advantage is that of the current student."""
    z, logp, log_mu = (
        random_logits(seed=1),
        random_logits(seed=2).log_softmax(-1),
        random_logits(seed=3).log_softmax(-1),
    )
    biased = expected_gradient(
        lambda logq: -(logq - log_mu).exp() * (logp - log_mu).detach(), z, behaviour=log_mu.exp()
    )
    assert (biased - gradient_of_reverse_kl(z, logp)).abs().max() > 0.05


def test_differentiating_the_k1_estimate_itself_would_not_learn() -> None:
    """Why the loss is a policy gradient: log q − log p has the right value and a gradient of zero mean."""
    z, logp = random_logits(seed=4), random_logits(seed=5).log_softmax(-1)
    found = expected_gradient(lambda logq: logq - logp, z, behaviour=z.softmax(-1))
    assert found.abs().max() < 1e-15
    assert gradient_of_reverse_kl(z, logp).abs().max() > 0.05


def test_on_policy_its_value_is_log_q_minus_log_p() -> None:
    logq, logp = torch.tensor([-0.5, -2.0]).double(), torch.tensor([-1.5, -0.1]).double()
    torch.testing.assert_close(sampled_reverse_kl(logq, logp, logq, ratio_cap=1.0), logq - logp)


def test_the_cap_truncates_large_ratios_and_leaves_small_ones() -> None:
    logq = torch.tensor([0.5, 0.2], dtype=torch.float64).log().requires_grad_()
    log_mu = torch.tensor([0.05, 0.4], dtype=torch.float64).log()  # ratios 10 and 0.5
    logp = torch.tensor([0.1, 0.3], dtype=torch.float64).log()
    advantage = (logp - logq).detach()
    (free,) = torch.autograd.grad(sampled_reverse_kl(logq, logp, log_mu, ratio_cap=None).sum(), logq)
    (capped,) = torch.autograd.grad(sampled_reverse_kl(logq, logp, log_mu, ratio_cap=4.0).sum(), logq)
    torch.testing.assert_close(free, -torch.tensor([10.0, 0.5]).double() * advantage)
    torch.testing.assert_close(capped, -torch.tensor([4.0, 0.5]).double() * advantage)


def test_a_student_that_agrees_with_the_teacher_has_no_gradient() -> None:
    logq = torch.tensor([-0.5, -2.0], dtype=torch.float64, requires_grad=True)
    loss = sampled_reverse_kl(logq, logq.detach(), torch.tensor([-1.0, -1.0]).double(), ratio_cap=5.0)
    assert torch.autograd.grad(loss.sum(), logq)[0].tolist() == [0.0, 0.0]


def test_only_the_students_log_prob_carries_gradient() -> None:
    logq, logp, log_mu = (torch.tensor([-1.0 - i], requires_grad=True) for i in range(3))
    sampled_reverse_kl(logq, logp, log_mu, ratio_cap=None).sum().backward()
    assert logq.grad is not None
    assert logp.grad is None
    assert log_mu.grad is None


def test_negative_log_likelihood_is_minus_log_q() -> None:
    assert negative_log_likelihood(torch.tensor([-0.25, -3.0])).tolist() == [0.25, 3.0]
