"""Values against sums written out in Python floats, gradients against algorithms §0 and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.divergences import entropy, forward_kl, jsd, reverse_kl

Divergence = Callable[[Tensor, Tensor], Tensor]

exact_forward_kl: Divergence = partial(forward_kl, pointwise_clip=None)
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": exact_forward_kl,
    "clipped_forward_kl": partial(forward_kl, pointwise_clip=0.05),
    "reverse_kl": reverse_kl,
    "jsd_0.1": partial(jsd, beta=0.1),
    "jsd_0.5": partial(jsd, beta=0.5),
    "jsd_0.9": partial(jsd, beta=0.9),
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)

logits = st.lists(st.floats(-8, 8), min_size=5, max_size=5).map(lambda z: torch.tensor(z, dtype=torch.float64))


def random_logits(*, seed: int, rows: int = 3, outcomes: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, outcomes, dtype=torch.float64, generator=generator)


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def gradient(divergence: Divergence, z: Tensor, logp: Tensor) -> Tensor:
    """∂/∂z of the divergence of q = softmax(z)."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(divergence(z.log_softmax(-1), logp).sum(), z)[0]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def test_values_are_the_sums_of_the_definitions() -> None:
    logq, logp = random_logits(seed=1).log_softmax(-1), random_logits(seed=2).log_softmax(-1)
    for row in range(len(logq)):
        q, p = logq[row].exp().tolist(), logp[row].exp().tolist()
        m = [0.3 * a + 0.7 * b for a, b in zip(p, q, strict=True)]
        assert exact_forward_kl(logq, logp)[row].item() == pytest.approx(kl(p, q), rel=1e-12)
        assert reverse_kl(logq, logp)[row].item() == pytest.approx(kl(q, p), rel=1e-12)
        assert jsd(logq, logp, beta=0.3)[row].item() == pytest.approx(0.3 * kl(p, m) + 0.7 * kl(q, m), rel=1e-12)
        assert entropy(logq)[row].item() == pytest.approx(-math.fsum(x * math.log(x) for x in q), rel=1e-12)


@every_divergence
def test_equal_distributions_have_no_divergence_and_no_gradient(divergence: Divergence) -> None:
    z = random_logits(seed=3)
    assert divergence(z.log_softmax(-1), z.log_softmax(-1)).abs().max() < 1e-15
    assert gradient(divergence, z, z.log_softmax(-1)).abs().max() < 1e-15


@every_divergence
def test_autograd_agrees_with_finite_differences(divergence: Divergence) -> None:
    logp = random_logits(seed=5).log_softmax(-1)
    z = random_logits(seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(z.log_softmax(-1), logp), (z,))


def test_gradient_of_the_forward_kl_is_q_minus_p() -> None:
    z, logp = random_logits(seed=6), random_logits(seed=7).log_softmax(-1)
    torch.testing.assert_close(gradient(exact_forward_kl, z, logp), z.softmax(-1) - logp.exp())


def test_gradient_of_the_reverse_kl_is_its_closed_form() -> None:
    z, logp = random_logits(seed=6), random_logits(seed=7).log_softmax(-1)
    logq = z.log_softmax(-1)
    expected = logq.exp() * (logq - logp - reverse_kl(logq, logp).unsqueeze(-1))
    torch.testing.assert_close(gradient(reverse_kl, z, logp), expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gradient_of_the_jsd_is_its_closed_form(beta: float) -> None:
    z, logp = random_logits(seed=6), random_logits(seed=7).log_softmax(-1)
    logq = z.log_softmax(-1)
    logm = (beta * logp.exp() + (1 - beta) * logq.exp()).log()
    expected = (1 - beta) * logq.exp() * (logq - logm - reverse_kl(logq, logm).unsqueeze(-1))
    torch.testing.assert_close(gradient(partial(jsd, beta=beta), z, logp), expected)


def test_gradient_of_the_clipped_forward_kl_pushes_clipped_outcomes_down() -> None:
    z, logp, cap = random_logits(seed=6), random_logits(seed=7).log_softmax(-1), 0.05
    p, q = logp.exp(), z.softmax(-1)
    unclipped = (p * (logp - z.log_softmax(-1)) < cap).double()
    assert 0 < unclipped.sum() < unclipped.numel()
    expected = q * (p * unclipped).sum(-1, keepdim=True) - p * unclipped
    found = gradient(partial(forward_kl, pointwise_clip=cap), z, logp)
    torch.testing.assert_close(found, expected)
    assert (found[unclipped == 0] > 0).all()


def test_clip_bounds_every_term_and_may_make_the_sum_negative() -> None:
    logq, logp = log(0.5, 0.5), log(0.9, 0.1)
    assert forward_kl(logq, logp, pointwise_clip=0.05).item() == pytest.approx(0.05 + 0.1 * math.log(0.2))
    assert forward_kl(logq, logp, pointwise_clip=0.05) < 0
    assert forward_kl(logq, logp, pointwise_clip=1e9) == exact_forward_kl(logq, logp)


def test_scaled_jsd_tends_to_the_forward_and_the_reverse_kl() -> None:
    logq, logp = random_logits(seed=8).log_softmax(-1), random_logits(seed=9).log_softmax(-1)
    near = 1e-7
    torch.testing.assert_close(jsd(logq, logp, beta=near) / near, exact_forward_kl(logq, logp), rtol=1e-4, atol=0)
    torch.testing.assert_close(jsd(logq, logp, beta=1 - near) / near, reverse_kl(logq, logp), rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan])
def test_jsd_refuses_a_beta_outside_the_open_interval(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must lie in"):
        jsd(log(0.5, 0.5), log(0.5, 0.5), beta=beta)


@settings(deadline=None)  # the first example warms torch up
@given(logits, logits, st.floats(0.01, 0.99))
def test_divergences_are_not_negative_and_the_jsd_is_bounded_and_symmetric(z: Tensor, w: Tensor, beta: float) -> None:
    logq, logp = z.log_softmax(-1), w.log_softmax(-1)
    rounding = 1e-12
    assert exact_forward_kl(logq, logp) >= -rounding
    assert reverse_kl(logq, logp) >= -rounding
    assert -rounding <= jsd(logq, logp, beta=0.5) <= math.log(2) + rounding
    torch.testing.assert_close(jsd(logq, logp, beta=beta), jsd(logp, logq, beta=1 - beta), rtol=1e-9, atol=1e-12)


def test_jsd_of_disjoint_distributions_is_log_2() -> None:
    assert jsd(log(1, 0), log(0, 1), beta=0.5).item() == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("name", ["forward_kl", "clipped_forward_kl", "jsd_0.1", "jsd_0.5", "jsd_0.9"])
def test_an_outcome_that_the_teacher_rules_out_leaves_value_and_gradient_finite(name: str) -> None:
    divergence, z = DIVERGENCES[name], random_logits(seed=10, rows=1, outcomes=3)
    nearly = log(0.3, 0.7, 1e-300)
    ruled_out = log(0.3, 0.7, 0.0)
    torch.testing.assert_close(divergence(z.log_softmax(-1), ruled_out), divergence(z.log_softmax(-1), nearly))
    torch.testing.assert_close(gradient(divergence, z, ruled_out), gradient(divergence, z, nearly))


@every_divergence
def test_an_outcome_that_both_sides_rule_out_changes_nothing(divergence: Divergence) -> None:
    z, logp = torch.tensor([0.3, -1.2]).double(), log(0.25, 0.75)
    never = torch.tensor([-math.inf]).double()
    wider_z, wider_logp = torch.cat([z, never]), torch.cat([logp, never])
    assert divergence(wider_z.log_softmax(-1), wider_logp) == divergence(z.log_softmax(-1), logp)
    expected = torch.cat([gradient(divergence, z, logp), torch.zeros(1)])
    torch.testing.assert_close(gradient(divergence, wider_z, wider_logp), expected, rtol=0, atol=1e-16)


def test_reverse_kl_to_a_teacher_that_rules_out_a_possible_outcome_is_infinite() -> None:
    assert reverse_kl(log(0.5, 0.5), log(1, 0)) == math.inf


@pytest.mark.parametrize("outcomes", [2, 7, 50])
def test_entropy_is_greatest_for_the_uniform_distribution(outcomes: int) -> None:
    uniform = torch.zeros(outcomes, dtype=torch.float64).log_softmax(-1)
    assert entropy(uniform).item() == pytest.approx(math.log(outcomes))
    assert entropy(random_logits(seed=outcomes, rows=1, outcomes=outcomes).log_softmax(-1)) < math.log(outcomes)


def test_entropy_of_a_certain_outcome_is_zero_with_a_finite_gradient() -> None:
    z = torch.tensor([0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    value = entropy(z.log_softmax(-1))
    assert value == 0
    assert torch.autograd.grad(value, z)[0].isfinite().all()
