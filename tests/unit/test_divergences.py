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

from learner.divergences import (
    balanced_kl,
    entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)

Divergence = Callable[[Tensor, Tensor], Tensor]

CAP = 0.05
exact_forward_kl: Divergence = partial(forward_kl, pointwise_clip=None, zero_sum=False)
clipped_forward_kl: Divergence = partial(forward_kl, pointwise_clip=CAP, zero_sum=False)
zero_sum_forward_kl: Divergence = partial(forward_kl, pointwise_clip=CAP, zero_sum=True)
skew: Divergence = partial(skew_forward_kl, alpha=0.1)
skew_reverse: Divergence = partial(skew_reverse_kl, alpha=0.1, detach_mixture=False)
skew_reverse_detached: Divergence = partial(skew_reverse_kl, alpha=0.1, detach_mixture=True)
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": exact_forward_kl,
    "clipped_forward_kl": clipped_forward_kl,
    "zero_sum_forward_kl": zero_sum_forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0": partial(jsd, beta=0.0),
    "jsd_1": partial(jsd, beta=1.0),
    "jsd_0.1": partial(jsd, beta=0.1),
    "jsd_0.5": partial(jsd, beta=0.5),
    "jsd_0.9": partial(jsd, beta=0.9),
    "skew_forward_kl": skew,
    "skew_reverse_kl": skew_reverse,
    "skew_reverse_kl_detached": skew_reverse_detached,
    "balanced_kl": partial(balanced_kl, sharpness=2.0),
}
WITHOUT_CONSTANTS = {k: v for k, v in DIVERGENCES.items() if k not in {"balanced_kl", "skew_reverse_kl_detached"}}
FINITE_WHERE_THE_TEACHER_IS_NOT = [name for name in DIVERGENCES if name not in {"reverse_kl", "jsd_1", "balanced_kl"}]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)

logits = st.lists(st.floats(-8, 8), min_size=5, max_size=5).map(lambda z: torch.tensor(z, dtype=torch.float64))


def random_logits(*, seed: int, rows: int = 3, outcomes: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, outcomes, dtype=torch.float64, generator=generator)


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def gradient(divergence: Divergence, z: Tensor, logp: Tensor) -> Tensor:
    """∂/∂z of the divergence of q = softmax(z)."""
    return gradient_of(lambda z: divergence(z.log_softmax(-1), logp), z)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def reverse_skewed(logq: Tensor, logp: Tensor, *, alpha: float) -> Tensor:
    return skew_reverse_kl(logq, logp, alpha=alpha, detach_mixture=False)


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
        assert skew_forward_kl(logq, logp, alpha=0.3)[row].item() == pytest.approx(kl(p, m), rel=1e-12)
        for detached in (False, True):
            skewed = skew_reverse_kl(logq, logp, alpha=0.7, detach_mixture=detached)
            assert skewed[row].item() == pytest.approx(kl(q, m), rel=1e-12)
        assert entropy(logq)[row].item() == pytest.approx(-math.fsum(x * math.log(x) for x in q), rel=1e-12)


@every_divergence
def test_equal_distributions_have_no_divergence_and_no_gradient(divergence: Divergence) -> None:
    z = random_logits(seed=3)
    assert divergence(z.log_softmax(-1), z.log_softmax(-1)).abs().max() < 1e-15
    assert gradient(divergence, z, z.log_softmax(-1)).abs().max() < 1e-15


@pytest.mark.parametrize("divergence", WITHOUT_CONSTANTS.values(), ids=WITHOUT_CONSTANTS)
def test_autograd_agrees_with_finite_differences(divergence: Divergence) -> None:
    logp = random_logits(seed=5).log_softmax(-1)
    z = random_logits(seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(z.log_softmax(-1), logp), (z,))


def test_detached_parts_are_constants_to_finite_differences() -> None:
    w, logp = random_logits(seed=4).log_softmax(-1), random_logits(seed=5).log_softmax(-1)
    logm = (0.1 * w.exp() + 0.9 * logp.exp()).log()
    gate = torch.sigmoid(2 * (entropy(w) - entropy(logp)))

    def skewed(z: Tensor) -> Tensor:
        return reverse_kl(z.log_softmax(-1), logm)

    def balanced(z: Tensor) -> Tensor:
        logq = z.log_softmax(-1)
        return gate * reverse_kl(logq, logp) + (1 - gate) * exact_forward_kl(logq, logp)

    for name, frozen in {"skew_reverse_kl_detached": skewed, "balanced_kl": balanced}.items():
        z = w.clone().requires_grad_()
        assert torch.autograd.gradcheck(frozen, (z,))
        torch.testing.assert_close(gradient(DIVERGENCES[name], w, logp), gradient_of(frozen, w))


def test_gradients_by_free_log_probs_are_those_of_the_docstrings() -> None:
    logq, logp = random_logits(seed=6).log_softmax(-1) - 0.3, random_logits(seed=7).log_softmax(-1) - 0.2
    q, p = logq.exp(), logp.exp()
    gate = torch.sigmoid(2 * (entropy(logq) - entropy(logp))).unsqueeze(-1)
    m, skewed, mirrored = 0.5 * p + 0.5 * q, 0.1 * p + 0.9 * q, 0.9 * p + 0.1 * q
    expected = {
        "forward_kl": -p,
        "clipped_forward_kl": -p * (p * (logp - logq) <= CAP),
        "reverse_kl": q * (logq - logp + 1),
        "jsd_0.5": 0.5 * q * (q / m).log(),
        "skew_forward_kl": -0.9 * p * q / skewed,
        "skew_reverse_kl": q * ((q / mirrored).log() + 1 - 0.1 * q / mirrored),
        "skew_reverse_kl_detached": q * ((q / mirrored).log() + 1),
        "balanced_kl": gate * q * (logq - logp + 1) - (1 - gate) * p,
    }
    for name, closed_form in expected.items():
        free = partial(DIVERGENCES[name], logp=logp)
        torch.testing.assert_close(gradient_of(free, logq), closed_form, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(gradient_of(entropy, logq), -q * (logq + 1))


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


def test_gradient_of_the_skew_forward_kl_is_its_closed_form() -> None:
    z, logp = random_logits(seed=6), random_logits(seed=7).log_softmax(-1)
    q, p = z.softmax(-1), logp.exp()
    m = 0.1 * p + 0.9 * q
    expected = -0.9 * q * (p / m - (q * p / m).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(skew, z, logp), expected)


@pytest.mark.parametrize("detached", [False, True])
def test_gradient_of_the_skew_reverse_kl_depends_on_whether_the_mixture_is_a_constant(detached: bool) -> None:
    z, logp = random_logits(seed=6), random_logits(seed=7).log_softmax(-1)
    q, p = z.softmax(-1), logp.exp()
    m = 0.9 * p + 0.1 * q
    inside = (q / m).log() - (0 if detached else 0.1 * q / m)
    expected = q * (inside - (q * inside).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(skew_reverse_detached if detached else skew_reverse, z, logp), expected)


def test_gradient_of_the_clipped_forward_kl_pushes_clipped_outcomes_down() -> None:
    z, logp = random_logits(seed=6), random_logits(seed=7).log_softmax(-1)
    p, q = logp.exp(), z.softmax(-1)
    unclipped = (p * (logp - z.log_softmax(-1)) < CAP).double()
    assert 0 < unclipped.sum() < unclipped.numel()
    expected = q * (p * unclipped).sum(-1, keepdim=True) - p * unclipped
    found = gradient(clipped_forward_kl, z, logp)
    torch.testing.assert_close(found, expected)
    assert (found[unclipped == 0] > 0).all()


def test_gradient_of_the_zero_sum_clip_is_zero_at_clipped_outcomes_and_sums_to_zero_over_the_others() -> None:
    z, logp = random_logits(seed=6), random_logits(seed=7).log_softmax(-1)
    p, q = logp.exp(), z.softmax(-1)
    unclipped = (p * (logp - z.log_softmax(-1)) < CAP).double()
    assert 0 < unclipped.sum() < unclipped.numel()
    mass_p, mass_q = (p * unclipped).sum(-1, keepdim=True), (q * unclipped).sum(-1, keepdim=True)
    found = gradient(zero_sum_forward_kl, z, logp)
    torch.testing.assert_close(found, unclipped * (q * mass_p / mass_q - p))
    assert found.sum(-1).abs().max() < 1e-15
    assert (found[unclipped == 0].abs() < 1e-16).all()


def test_zero_sum_clip_is_the_forward_kl_of_the_unclipped_outcomes_renormalised() -> None:
    logq, logp = random_logits(seed=6).log_softmax(-1), random_logits(seed=7).log_softmax(-1)
    for row in range(len(logq)):
        q, p = logq[row].exp().tolist(), logp[row].exp().tolist()
        kept = [(a, b) for a, b in zip(p, q, strict=True) if a * math.log(a / b) <= CAP]
        mass_p, mass_q = math.fsum(a for a, _ in kept), math.fsum(b for _, b in kept)
        expected = mass_p * kl([a / mass_p for a, _ in kept], [b / mass_q for _, b in kept])
        assert zero_sum_forward_kl(logq, logp)[row].item() == pytest.approx(expected, rel=1e-12)


def test_clip_that_nothing_reaches_is_the_forward_kl_with_or_without_zero_sum() -> None:
    logq, logp = random_logits(seed=6).log_softmax(-1), random_logits(seed=7).log_softmax(-1)
    for zero_sum in (False, True):
        loose = forward_kl(logq, logp, pointwise_clip=1e9, zero_sum=zero_sum)
        torch.testing.assert_close(loose, exact_forward_kl(logq, logp))
    assert torch.equal(forward_kl(logq, logp, pointwise_clip=None, zero_sum=True), exact_forward_kl(logq, logp))


def test_zero_sum_clip_of_a_partial_row_that_is_clipped_whole_is_zero_with_zero_gradient() -> None:
    logq, logp = log(0.01, 0.02, 0.0), log(0.5, 0.4, 0.0)
    assert zero_sum_forward_kl(logq, logp) == 0
    assert torch.equal(gradient_of(partial(zero_sum_forward_kl, logp=logp), logq), torch.zeros(3).double())


def test_clip_bounds_every_term_and_may_make_the_sum_negative() -> None:
    logq, logp = log(0.5, 0.5), log(0.9, 0.1)
    assert clipped_forward_kl(logq, logp).item() == pytest.approx(CAP + 0.1 * math.log(0.2))
    assert clipped_forward_kl(logq, logp) < 0 <= zero_sum_forward_kl(logq, logp)


@pytest.mark.parametrize("name", ["forward_kl", "clipped_forward_kl", "zero_sum_forward_kl", "reverse_kl", "jsd_0.5"])
def test_a_score_that_is_nan_is_not_hidden(name: str) -> None:
    assert DIVERGENCES[name](log(0.5, 0.5), torch.tensor([math.nan, -1.0]).double()).isnan()


def test_scaled_jsd_tends_to_the_forward_and_the_reverse_kl() -> None:
    logq, logp = random_logits(seed=8).log_softmax(-1), random_logits(seed=9).log_softmax(-1)
    near = 1e-7
    torch.testing.assert_close(jsd(logq, logp, beta=near) / near, exact_forward_kl(logq, logp), rtol=1e-4, atol=0)
    torch.testing.assert_close(jsd(logq, logp, beta=1 - near) / near, reverse_kl(logq, logp), rtol=1e-4, atol=0)


def test_jsd_at_its_ends_is_the_forward_and_the_reverse_kl() -> None:
    logq, logp = random_logits(seed=8).log_softmax(-1), random_logits(seed=9).log_softmax(-1)
    assert torch.equal(jsd(logq, logp, beta=0), exact_forward_kl(logq, logp))
    assert torch.equal(jsd(logq, logp, beta=1), reverse_kl(logq, logp))


def test_skew_kls_tend_to_the_kls_for_small_alpha_and_to_zero_for_large() -> None:
    logq, logp = random_logits(seed=8).log_softmax(-1), random_logits(seed=9).log_softmax(-1)
    for skewed, plain in ((skew_forward_kl, exact_forward_kl), (reverse_skewed, reverse_kl)):
        assert torch.equal(skewed(logq, logp, alpha=0), plain(logq, logp))
        torch.testing.assert_close(skewed(logq, logp, alpha=1e-9), plain(logq, logp), rtol=1e-4, atol=0)
        assert skewed(logq, logp, alpha=1 - 1e-9).abs().max() < 1e-8


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_mixture_refuses_a_share_that_is_none(share: float) -> None:
    for mixture in (
        partial(jsd, beta=share),
        partial(skew_forward_kl, alpha=share),
        partial(reverse_skewed, alpha=share),
    ):
        with pytest.raises(ValueError, match="a share of a mixture lies in"):
            mixture(log(0.5, 0.5), log(0.5, 0.5))


@settings(deadline=None)
@given(logits, logits, st.floats(0.01, 0.99))
def test_skew_kls_are_bounded_by_minus_log_alpha_and_make_up_the_jsd(z: Tensor, w: Tensor, share: float) -> None:
    logq, logp = z.log_softmax(-1), w.log_softmax(-1)
    forward, reverse = skew_forward_kl(logq, logp, alpha=share), reverse_skewed(logq, logp, alpha=1 - share)
    assert -1e-12 <= forward <= -math.log(share) + 1e-12
    assert -1e-12 <= reverse <= -math.log1p(-share) + 1e-12
    mixed = share * forward + (1 - share) * reverse
    torch.testing.assert_close(mixed, jsd(logq, logp, beta=share), rtol=1e-9, atol=1e-12)


def test_skew_kls_of_disjoint_distributions_reach_their_bound() -> None:
    for skewed in (skew, skew_reverse, skew_reverse_detached):
        assert skewed(log(1, 0), log(0, 1)).item() == pytest.approx(-math.log(0.1), rel=1e-15)


def test_balanced_kl_is_half_of_each_between_equally_sure_distributions() -> None:
    logq, logp = log(0.1, 0.2, 0.7), log(0.7, 0.1, 0.2)
    half = 0.5 * reverse_kl(logq, logp) + 0.5 * exact_forward_kl(logq, logp)
    torch.testing.assert_close(balanced_kl(logq, logp, sharpness=3.0), half)


def test_balanced_kl_seeks_a_mode_when_the_student_is_less_sure_and_covers_when_it_is_surer() -> None:
    sure, unsure = log(0.9, 0.06, 0.04), log(0.3, 0.45, 0.25)
    torch.testing.assert_close(balanced_kl(unsure, sure, sharpness=1e3), reverse_kl(unsure, sure))
    torch.testing.assert_close(balanced_kl(sure, unsure, sharpness=1e3), exact_forward_kl(sure, unsure))


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


@pytest.mark.parametrize("name", FINITE_WHERE_THE_TEACHER_IS_NOT)
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


@every_divergence
def test_an_outcome_outside_a_partial_support_changes_nothing(divergence: Divergence) -> None:
    logq, logp, never = log(0.3, 0.2), log(0.25, 0.6), log(0.0)
    wide_q, wide_p = torch.cat([never, logq]), torch.cat([never, logp])
    torch.testing.assert_close(divergence(wide_q, wide_p), divergence(logq, logp), rtol=0, atol=1e-16)
    expected = torch.cat([torch.zeros(1), gradient_of(partial(divergence, logp=logp), logq)])
    torch.testing.assert_close(gradient_of(partial(divergence, logp=wide_p), wide_q), expected, rtol=0, atol=1e-16)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd_1", "balanced_kl"])
def test_reverse_kl_to_a_teacher_that_rules_out_a_possible_outcome_is_infinite(name: str) -> None:
    assert DIVERGENCES[name](log(0.5, 0.5), log(1, 0)) == math.inf


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
