"""A tail bucket keeps a truncated divergence a divergence; sets are Python's sets; sampled targets are unbiased."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import partial
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.divergences import forward_kl, jsd, reverse_kl
from learner.supports import (
    intersection,
    log1mexp,
    log_outside,
    log_rest,
    nucleus,
    random_sampling,
    union,
    with_bucket,
)

Divergence = Callable[[Tensor, Tensor], Tensor]

VOCABULARY = 7
ROUNDING = 1e-8  # a rest of 1e-6, the least that logits of ±6 leave, is a difference of numbers near 1
W = torch.tensor([[2.0, -1.0, 0.5, 0.0, -2.0, 1.0, 0.3]], dtype=torch.float64)  # a teacher's logits
SUPPORT = torch.tensor([[0, 2, 4]])  # holds 0.63 of its mass
plain_forward_kl: Divergence = partial(forward_kl, pointwise_clip=None, zero_sum=False)
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": plain_forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": partial(jsd, beta=0.5),
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)

logits = st.lists(st.floats(-6, 6), min_size=VOCABULARY, max_size=VOCABULARY).map(
    lambda z: torch.tensor([z], dtype=torch.float64)
)
orders = st.permutations(range(VOCABULARY))
id_rows = st.lists(st.integers(0, 11), min_size=4, max_size=4, unique=True).map(lambda ids: torch.tensor([ids]))


def tail(z: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of the ids and of all else together."""
    kept = partial_rest(z, ids)
    return with_bucket(kept, log_rest(kept))


def renorm(z: Tensor, ids: Tensor) -> Tensor:
    """Log-probs among the ids."""
    return z.gather(-1, ids).log_softmax(-1)


def partial_rest(z: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of the ids, and nothing of the rest."""
    return z.log_softmax(-1).gather(-1, ids)


Rest = Callable[[Tensor, Tensor], Tensor]
RESTS: dict[str, Rest] = {"tail": tail, "renorm": renorm, "partial": partial_rest}


def over(divergence: Divergence, z: Tensor, w: Tensor, ids: list[int], rest: Rest = tail) -> float:
    """The divergence over `ids` and what becomes of the rest, [1, V] logits on both sides."""
    support = torch.tensor([ids])
    return divergence(rest(z, support), rest(w, support)).item()


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor | None = None) -> Tensor:
    """Probabilities [V] at which descent ends, from the uniform distribution or the logits [1, V] given."""
    z = (torch.zeros(1, VOCABULARY, dtype=torch.float64) if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=300, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(z)
        value.backward()
        return value

    optimizer.step(closure)
    return z.detach().softmax(-1)[0]


def on_support(divergence: Divergence, rest: Rest) -> Callable[[Tensor], Tensor]:
    """The loss of student logits [1, V] against the teacher W over SUPPORT."""
    return lambda z: divergence(rest(z, SUPPORT), rest(W, SUPPORT)).sum()


def log_one_minus_exp(x: float) -> float:
    """log(1 − e^x) with fifty digits."""
    with localcontext() as context:
        context.prec = 50
        return float((1 - Decimal(x).exp()).ln())


def grid(points: int, *, draws: int) -> Tensor:
    """Every tuple of `draws` midpoints of `points` equal parts of [0, 1): their mean is an expectation."""
    middles = [(i + 0.5) / points for i in range(points)]
    return torch.tensor(list(product(middles, repeat=draws)), dtype=torch.float64)


def dense(ids: Tensor, weights: Tensor, *, vocabulary: int) -> Tensor:
    """A sparse target [C, M] as probabilities [C, V]; an id that is there twice counts twice."""
    return torch.zeros(len(ids), vocabulary, dtype=weights.dtype).scatter_add(-1, ids, weights.exp())


def zipf(vocabulary: int, *, exponent: float = 1.3) -> Tensor:
    """[V] log-probs."""
    return (-exponent * torch.arange(1, vocabulary + 1, dtype=torch.float64).log()).log_softmax(-1)


P_GRID = torch.tensor([[5, 0, 3, 1, 1, 10]], dtype=torch.float64) / 20  # on a grid of 20 points an exact expectation


# The rest of the vocabulary.


def test_the_tail_is_the_kept_probabilities_and_the_sum_of_the_others() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    q = z.softmax(-1)[0]
    torch.testing.assert_close(tail(z, torch.tensor([[3, 1]]))[0].exp(), torch.stack([q[3], q[1], q[0] + q[2]]))


@pytest.mark.parametrize("rest", RESTS.values(), ids=RESTS)
@every_divergence
@settings(max_examples=50, deadline=None)  # the first example warms torch up
@given(z=logits, w=logits, order=orders)
def test_it_equals_the_full_divergence_when_every_token_is_kept(
    divergence: Divergence, rest: Rest, z: Tensor, w: Tensor, order: list[int]
) -> None:
    full = divergence(z.log_softmax(-1), w.log_softmax(-1)).item()
    assert over(divergence, z, w, order, rest) == pytest.approx(full, abs=ROUNDING)


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
    assert nested[VOCABULARY - 2] == pytest.approx(full, abs=ROUNDING)  # a bucket of one token is that token


@every_divergence
def test_with_a_tail_descent_ends_at_the_teacher_on_the_support_and_in_the_bucket(divergence: Divergence) -> None:
    q = minimum(on_support(divergence, tail))
    torch.testing.assert_close(q[SUPPORT[0]], W.softmax(-1)[0, SUPPORT[0]], rtol=1e-5, atol=0)


@every_divergence
def test_renormalised_the_support_is_learnt_and_its_mass_stays_what_it_happened_to_be(divergence: Divergence) -> None:
    loss, level = on_support(divergence, renorm), torch.zeros_like(W)
    masses = []
    for start in (level, level.scatter(-1, SUPPORT, -2.0)):
        q = minimum(loss, start)[SUPPORT[0]]
        torch.testing.assert_close(q / q.sum(), renorm(W, SUPPORT)[0].exp(), rtol=1e-5, atol=0)
        masses.append(q.sum().item())
    assert masses[0] > 0.6 > 0.3 > masses[1]
    z = level.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    assert gradient.gather(-1, SUPPORT).abs().min() > 1e-3
    assert gradient.scatter(-1, SUPPORT, 0.0).abs().max() < 1e-16


def test_left_out_the_rest_is_driven_to_nothing_by_a_forward_kl() -> None:
    q = minimum(on_support(plain_forward_kl, partial_rest))[SUPPORT[0]]
    torch.testing.assert_close(q, renorm(W, SUPPORT)[0].exp(), rtol=1e-4, atol=0)


def test_left_out_the_rest_takes_all_but_p_over_e_under_a_reverse_kl() -> None:
    q = minimum(on_support(reverse_kl, partial_rest))[SUPPORT[0]]
    torch.testing.assert_close(q, W.softmax(-1)[0, SUPPORT[0]] / torch.e, rtol=1e-5, atol=0)


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
    student = tail(torch.tensor([[0.0, 0.0, -200.0]]), torch.tensor([[0, 1]]))
    torch.testing.assert_close(student, teacher)
    assert reverse_kl(student, teacher).abs().item() < 1e-6


def test_gradient_of_the_tail_agrees_with_finite_differences() -> None:
    z = torch.randn(4, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[0, 3], [6, 2], [1, 5], [4, 0]])
    assert torch.autograd.gradcheck(lambda z: tail(z, ids), (z,))


def test_where_nothing_is_kept_the_rest_is_everything_and_has_no_gradient() -> None:
    kept = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    absent = torch.tensor([[False, True], [True, True]])
    rest = log_rest(kept.masked_fill(absent, -torch.inf))
    torch.testing.assert_close(rest.exp(), torch.tensor([1 - 1 / torch.e, 1.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(rest.sum(), kept)
    assert gradient[0, 0] < 0
    assert gradient.flatten()[1:].tolist() == [0.0, 0.0, 0.0]


@given(w=logits, ids=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5))
def test_the_mass_outside_counts_an_id_that_is_repeated_once(w: Tensor, ids: list[int]) -> None:
    outside = sum(w.softmax(-1)[0, v].item() for v in set(range(VOCABULARY)) - set(ids))
    assert log_outside(w.log_softmax(-1), torch.tensor([ids])).exp().item() == pytest.approx(outside, rel=1e-12)


def test_the_mass_outside_keeps_its_digits_in_float32_where_a_difference_from_one_has_none() -> None:
    logp = torch.tensor([[0.0, 1.0, -40.0, -41.0]]).log_softmax(-1)
    exact = (logp[0, 2:].double().exp().sum()).log().item()
    assert log_outside(logp, torch.tensor([[0, 1]])).item() == pytest.approx(exact, rel=1e-6)
    assert log_rest(logp[:, :2]).item() > exact + 20


def test_outside_of_the_whole_vocabulary_lies_nothing() -> None:
    assert log_outside(W.log_softmax(-1), torch.arange(VOCABULARY).unsqueeze(0)).item() == -torch.inf


# Sets.


@given(a=id_rows, b=id_rows)
def test_a_union_holds_every_id_once_besides_the_marked(a: Tensor, b: Tensor) -> None:
    ids, duplicate = union(a, b)
    assert ids.tolist() == [a[0].tolist() + b[0].tolist()]
    kept = ids[~duplicate].tolist()
    assert set(kept) == set(a[0].tolist()) | set(b[0].tolist())
    assert len(kept) == len(set(kept))


@given(a=id_rows, b=id_rows)
def test_an_intersection_holds_what_both_hold_besides_the_marked(a: Tensor, b: Tensor) -> None:
    ids, not_shared = intersection(a, b)
    assert ids.shape == a.shape
    assert set(ids[~not_shared].tolist()) == set(a[0].tolist()) & set(b[0].tolist())


def test_sets_are_those_of_each_row_and_of_any_two_lengths() -> None:
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1, 9], [1, 2, 4]])
    assert union(a, b)[1].tolist() == [[False, False, True, True, False], [False, False, False, False, True]]
    assert intersection(a, b)[1].tolist() == [[False, False], [True, False]]


@settings(max_examples=60, deadline=None)
@given(w=logits, mass=st.floats(0.05, 0.95))
def test_a_nucleus_is_the_smallest_set_with_the_mass(w: Tensor, mass: float) -> None:
    p = w.softmax(-1)[0]
    kept = nucleus(w.log_softmax(-1), mass)[0]
    assert p[kept].sum() >= mass - 1e-12
    smaller = [p[list(ids)].sum().item() for ids in combinations(range(VOCABULARY), int(kept.sum()) - 1)]
    assert max(smaller) < mass + 1e-12


def test_a_nucleus_is_cut_row_by_row_prefers_lower_ids_among_equals_and_never_holds_the_impossible() -> None:
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.05, 0.0, 0.9, 0.05]])
    assert nucleus(p.log(), 0.5).tolist() == [[True, True, False, False], [False, False, True, False]]
    assert nucleus(p.log(), 1 - 1e-12)[1].tolist() == [True, False, True, True]


@pytest.mark.parametrize("mass", [0.0, 1.0, -0.1, float("nan")])
def test_a_nucleus_of_no_or_of_all_mass_is_refused(mass: float) -> None:
    with pytest.raises(ValueError, match=r"lies in \(0, 1\)"):
        nucleus(W.log_softmax(-1), mass)


# Random sampling (2503.16870).


@pytest.mark.parametrize("head", [0, 1, 3])
def test_the_mean_of_a_sampled_target_is_the_teacher_for_one_draw(head: int) -> None:
    """Exact: with its head taken out, the tail's mass (10, 5 or 1 twentieths of what is left) divides the grid."""
    points = {0: 20, 1: 10, 3: 2}[head]
    uniforms = grid(points, draws=1)
    ids, weights = random_sampling(P_GRID.log().expand(len(uniforms), -1), uniforms, draws=1, head=head)
    torch.testing.assert_close(dense(ids, weights, vocabulary=6).mean(0), P_GRID[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("head", [0, 1])
def test_the_mean_of_a_sampled_target_is_the_teacher_for_several_draws(head: int) -> None:
    uniforms = grid(20, draws=3)
    ids, weights = random_sampling(P_GRID.log().expand(len(uniforms), -1), uniforms, draws=3, head=head)
    torch.testing.assert_close(dense(ids, weights, vocabulary=6).mean(0), P_GRID[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("head", [0, 2])
def test_the_mean_gradient_of_a_forward_kl_on_a_sampled_target_is_that_of_the_full_one(head: int) -> None:
    uniforms = grid(20 if head == 0 else 5, draws=2)
    ids, weights = random_sampling(P_GRID.log().expand(len(uniforms), -1), uniforms, draws=2, head=head)
    z = torch.tensor([[0.3, -1.0, 0.0, 2.0, -0.5, 0.8]], dtype=torch.float64, requires_grad=True)
    logq = z.log_softmax(-1).expand(len(uniforms), -1).gather(-1, ids).masked_fill(weights == -torch.inf, -torch.inf)
    (gradient,) = torch.autograd.grad(plain_forward_kl(logq, weights).mean(), z)
    torch.testing.assert_close(gradient, z.detach().softmax(-1) - P_GRID, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 5e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize("head", [0, 8])
def test_weights_sum_to_one_in_every_row(head: int, dtype: torch.dtype, rounding: float) -> None:
    """Even where the teacher's probabilities, summed over many tokens in float32, do not."""
    uniforms = torch.rand(64, 42, generator=torch.Generator().manual_seed(0))
    logp = (zipf(500) + 1e-5).to(dtype).expand(64, -1)
    _, weights = random_sampling(logp, uniforms, draws=42, head=head)
    assert weights.dtype == dtype
    assert (weights.exp().sum(-1) - 1).abs().max() < rounding


def test_every_draw_is_the_inverse_of_the_distribution_function_and_repeats_are_merged_into_one() -> None:
    p = torch.tensor([[0.1, 0.0, 0.4, 0.5]], dtype=torch.float64)
    uniforms = torch.tensor([[0.05, 0.3, 0.3, 0.99, 0.2, 0.0, 0.7]], dtype=torch.float64)
    expected = Counter([0, 2, 2, 3, 2, 0, 3])
    ids, weights = random_sampling(p.log(), uniforms, draws=7, head=0)
    counted = weights[0] > -torch.inf
    found = dict(zip(ids[0, counted].tolist(), (7 * weights[0, counted].exp()).tolist(), strict=True))
    assert int(counted.sum()) == len(expected)
    assert found == pytest.approx(dict(expected))


def test_only_the_first_uniforms_are_used_and_too_few_are_refused() -> None:
    logp, uniforms = zipf(20).unsqueeze(0), torch.rand(1, 9, generator=torch.Generator().manual_seed(1))
    found = random_sampling(logp, uniforms, draws=4, head=2)
    assert found[0].shape == (1, 6)
    torch.testing.assert_close(found, random_sampling(logp, uniforms[:, :4], draws=4, head=2))
    with pytest.raises(ValueError, match="10 draws at a position need as many uniforms, not 9"):
        random_sampling(logp, uniforms, draws=10, head=2)


def test_a_token_that_cannot_occur_is_never_drawn_at_the_ends_of_the_interval() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    ids, weights = random_sampling(p.log(), torch.tensor([[0.0, 1 - 2**-24]]), draws=2, head=0)
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights.exp(), torch.tensor([[0.5, 0.5]]))


def test_a_head_that_holds_everything_leaves_the_draws_without_weight() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0]])
    for head in (1, 3):
        ids, weights = random_sampling(p.log(), torch.tensor([[0.2, 0.8]]), draws=2, head=head)
        torch.testing.assert_close(dense(ids, weights, vocabulary=3), p)


def test_an_exact_head_lowers_the_variance_at_the_same_budget() -> None:
    """8 exact and 42 draws instead of 50 draws; a Zipf teacher of exponent 1.3."""
    p, rows = zipf(2000), 2000
    uniforms = torch.rand(rows, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    variances = []
    for head in (0, 8):
        ids, weights = random_sampling(p.expand(rows, -1), uniforms, draws=50 - head, head=head)
        target = dense(ids, weights, vocabulary=len(p))
        assert (target.mean(0)[:8] - p[:8].exp()).abs().max() < (0.006 if head == 0 else 1e-14)
        variances.append(target.var(0).sum().item())
    assert variances[0] == pytest.approx((1 - p.exp().square().sum().item()) / 50, rel=0.05)
    assert 4 < variances[0] / variances[1] < 5.5
