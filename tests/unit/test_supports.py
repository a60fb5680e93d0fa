"""The tail bucket keeps a truncated divergence a divergence, and keeps its digits at both ends."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.divergences import forward_kl, jsd, reverse_kl
from learner.supports import log1mexp, log_rest, outcomes, with_bucket

Divergence = Callable[[Tensor, Tensor], Tensor]

VOCABULARY = 7
ROUNDING = 1e-8  # a rest of 1e-6, the least that logits of ±6 leave, is a difference of numbers near 1
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": partial(forward_kl, pointwise_clip=None),
    "reverse_kl": reverse_kl,
    "jsd": partial(jsd, beta=0.5),
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)

logits = st.lists(st.floats(-6, 6), min_size=VOCABULARY, max_size=VOCABULARY).map(
    lambda z: torch.tensor([z], dtype=torch.float64)
)
orders = st.permutations(range(VOCABULARY))


def over(divergence: Divergence, z: Tensor, w: Tensor, ids: list[int]) -> float:
    """The divergence over `ids` and a bucket, [1, V] logits on both sides."""
    support = torch.tensor([ids])
    return divergence(outcomes(z, support), outcomes(w, support)).item()


def minimum(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits [1, V] at which descent from the uniform distribution ends."""
    z = torch.zeros(1, VOCABULARY, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [z], max_iter=300, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(z)
        value.backward()
        return value

    optimizer.step(closure)
    return z.detach()


def log_one_minus_exp(x: float) -> float:
    """log(1 − e^x) with fifty digits."""
    with localcontext() as context:
        context.prec = 50
        return float((1 - Decimal(x).exp()).ln())


def test_outcomes_are_the_kept_probabilities_and_the_sum_of_the_others() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    q = z.softmax(-1)[0]
    found = outcomes(z, torch.tensor([[3, 1]]))[0].exp()
    torch.testing.assert_close(found, torch.stack([q[3], q[1], q[0] + q[2]]))


@every_divergence
@settings(deadline=None)  # the first example warms torch up
@given(z=logits, w=logits, order=orders)
def test_it_equals_the_full_divergence_when_every_token_is_kept(
    divergence: Divergence, z: Tensor, w: Tensor, order: list[int]
) -> None:
    full = divergence(z.log_softmax(-1), w.log_softmax(-1)).item()
    assert over(divergence, z, w, order) == pytest.approx(full, abs=ROUNDING)
    assert over(divergence, z, w, order[:-1]) == pytest.approx(full, abs=ROUNDING)


@every_divergence
@settings(max_examples=60, deadline=None)
@given(z=logits, w=logits, order=orders)
def test_a_larger_support_never_sees_less_and_none_sees_more_than_the_full_divergence(
    divergence: Divergence, z: Tensor, w: Tensor, order: list[int]
) -> None:
    nested = [over(divergence, z, w, order[:k]) for k in range(1, VOCABULARY + 1)]
    full = divergence(z.log_softmax(-1), w.log_softmax(-1)).item()
    assert nested[0] >= -ROUNDING
    assert all(smaller <= larger + ROUNDING for smaller, larger in zip(nested, [*nested[1:], full], strict=True))


@every_divergence
def test_descent_ends_at_the_teacher_on_the_support_and_in_the_bucket(divergence: Divergence) -> None:
    w = torch.tensor([[2.0, -1.0, 0.5, 0.0, -2.0, 1.0, 0.3]], dtype=torch.float64)
    ids = torch.tensor([[0, 2, 4]])
    z = minimum(lambda z: divergence(outcomes(z, ids), outcomes(w, ids)).sum())
    torch.testing.assert_close(z.softmax(-1)[0, ids[0]], w.softmax(-1)[0, ids[0]], rtol=1e-5, atol=0)


def test_a_top_k_reverse_kl_without_the_bucket_would_push_mass_out_of_the_support() -> None:
    """Why the bucket is there: the truncated sum is least at Q = P/e (algorithms §0)."""
    w = torch.tensor([[2.0, -1.0, 0.5, 0.0, -2.0, 1.0, 0.3]], dtype=torch.float64)

    def truncated(z: Tensor) -> Tensor:
        logq, logp = z.log_softmax(-1)[:, :3], w.log_softmax(-1)[:, :3]
        return (logq.exp() * (logq - logp)).sum()

    kept, teachers = minimum(truncated).softmax(-1)[0, :3].sum(), w.softmax(-1)[0, :3].sum()
    torch.testing.assert_close(kept, teachers / torch.e, rtol=1e-5, atol=0)


@pytest.mark.parametrize("x", [-1e-15, -1e-8, -0.1, -0.6931, -0.6932, -1.0, -30.0, -700.0])
def test_log1mexp_keeps_all_digits_on_both_sides(x: float) -> None:
    found = log1mexp(torch.tensor(x, dtype=torch.float64)).item()
    assert found == pytest.approx(log_one_minus_exp(x), rel=1e-14)


@pytest.mark.parametrize("x", [-1e-6, -0.01, -0.6931, -0.6932, -3.0, -80.0])
def test_log1mexp_keeps_all_digits_in_float32(x: float) -> None:
    value = torch.tensor(x, dtype=torch.float32)
    assert log1mexp(value).item() == pytest.approx(log_one_minus_exp(value.item()), rel=5e-7)


def test_log1mexp_has_the_gradient_of_its_formula_in_both_branches() -> None:
    x = torch.tensor([-1e-9, -1e-3, -0.5, -0.9, -20.0, -300.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(log1mexp(x).sum(), x)
    torch.testing.assert_close(found, -1 / torch.expm1(-x.detach()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rest", [1e-6, 1e-4, 0.1, 0.9])
def test_a_rest_in_float32_is_right_to_a_few_roundings_of_one(rest: float) -> None:
    kept = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log() + torch.log1p(torch.tensor(-rest).double())
    true = 1 - kept.float().double().exp().sum().item()
    assert log_rest(kept.float()).exp().item() == pytest.approx(true, abs=4 * torch.finfo(torch.float32).eps)


def test_a_rest_of_almost_everything_keeps_all_digits() -> None:
    kept = torch.tensor([[1e-20, 2e-20]], dtype=torch.float32).log()
    assert log_rest(kept).item() == pytest.approx(-3e-20, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rest_that_rounding_made_negative_is_floored_with_a_finite_gradient(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    kept = torch.tensor([[0.75, 0.25 + 2 * eps]], dtype=dtype).log().requires_grad_()
    rest = log_rest(kept)
    assert rest.exp().item() == pytest.approx(eps, rel=1e-6)
    assert torch.autograd.grad(rest.sum(), kept)[0].isfinite().all()


def test_an_empty_bucket_of_the_teacher_is_floored_like_the_students() -> None:
    kept = torch.tensor([[0.5, 0.5]]).log()
    teacher = with_bucket(kept, torch.tensor([-torch.inf]))
    student = outcomes(torch.tensor([[0.0, 0.0, -200.0]]), torch.tensor([[0, 1]]))
    torch.testing.assert_close(student, teacher)
    assert reverse_kl(student, teacher).abs().item() < 1e-6


def test_gradient_of_outcomes_agrees_with_finite_differences() -> None:
    z = torch.randn(4, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[0, 3], [6, 2], [1, 5], [4, 0]])
    assert torch.autograd.gradcheck(lambda z: outcomes(z, ids), (z,))
