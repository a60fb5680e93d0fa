"""Each target at its ends and in the middle, by hand; what of it has a gradient; what −inf does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.chunk import Chunk
from learner.divergences import forward_kl
from learner.facts import ORIGINS, Facts, Moment
from learner.tempering import (
    apply,
    apply_over,
    bridge,
    noisy,
    one_hot_mix,
    standardised,
    swing,
    taid,
    tempered,
)
from potstill.algebra.targets import Bridge, OneHotMix, Standardised, Swing, Taid, Target, Tempered
from potstill.section import Ramp

ROWS, VOCABULARY = 3, 6
TOKENS = torch.tensor([4, 0, 2])
PRIVACY = torch.tensor([0.0, 0.5, 1.0]).double()


def random_logits(*, seed: int, rows: int = ROWS, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator)


def applied(
    target: Target, *, student: Tensor, teacher: Tensor, step: int = 1, t: float = math.nan
) -> tuple[Tensor, Tensor]:
    facts = Facts(
        token_ids=TOKENS,
        lengths=(ROWS,),
        positions=torch.arange(ROWS),
        origin=torch.full((ROWS,), ORIGINS["student"]),
        privacy=PRIVACY,
        uniforms=torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]),
    )
    chunk = Chunk(student, torch.arange(ROWS), facts)
    return apply(target, "main", chunk, teacher, Moment(step=step, steps=10, schedule={"main": t}))


def forward(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(student.log_softmax(-1), teacher.log_softmax(-1), pointwise_clip=None, zero_sum=False)


def gradient(target: Target, z: Tensor, teacher: Tensor, *, t: float = math.nan) -> Tensor:
    """∂/∂z of the forward KL to the target."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(forward(*applied(target, student=z, teacher=teacher, t=t)).sum(), z)[0]


def with_padding(z: Tensor, value: float = -math.inf) -> Tensor:
    return torch.cat([z, torch.full((len(z), 2), value).double()], dim=-1)


TARGETS: dict[str, Target] = {
    "tempered": Tempered(student=2.0, teacher=0.5),
    "standardised": Standardised(temperature=2.0),
    "taid": Taid(),
    "one_hot_mix": OneHotMix(share=0.3),
    "swing": Swing(max_temperature=3.0),
    "swing_with_noise": Swing(max_temperature=3.0, noise=0.01),
    "bridge": Bridge(beta=0.5),
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@every_target
def test_padding_of_the_vocabulary_changes_neither_value_nor_gradient(target: Target) -> None:
    z, w = random_logits(seed=1), random_logits(seed=2)
    wide = applied(target, student=with_padding(z), teacher=with_padding(w), t=0.4)
    narrow = applied(target, student=z, teacher=w, t=0.4)
    torch.testing.assert_close(forward(*wide), forward(*narrow))
    expected = with_padding(gradient(target, z, w, t=0.4), 0.0)
    torch.testing.assert_close(gradient(target, with_padding(z), with_padding(w), t=0.4), expected)


@every_target
def test_only_the_students_own_side_has_a_gradient(target: Target) -> None:
    z, w = random_logits(seed=1).requires_grad_(), random_logits(seed=2)
    student, teacher = applied(target, student=z, teacher=w, t=0.4)
    assert student.requires_grad
    assert not teacher.requires_grad


def test_tempering_divides_each_side_by_its_own_temperature() -> None:
    z, w = random_logits(seed=3), random_logits(seed=4)
    student, teacher = applied(Tempered(student=2.0, teacher=0.5), student=z, teacher=w)
    assert torch.equal(student, z / 2)
    assert torch.equal(teacher, w * 2)
    expected = (tempered(z, 3.0).softmax(-1) - tempered(w, 3.0).softmax(-1)) / 3
    torch.testing.assert_close(gradient(Tempered(student=3.0, teacher=3.0), z, w), expected)


def test_standardised_logits_have_mean_zero_and_deviation_one_over_the_temperature() -> None:
    for side in applied(Standardised(temperature=2.0), student=random_logits(seed=5), teacher=random_logits(seed=6)):
        torch.testing.assert_close(side.mean(-1), torch.zeros(ROWS).double())
        torch.testing.assert_close(side.std(-1, correction=0), torch.full((ROWS,), 0.5).double())


def test_standardising_forgets_scale_and_shift() -> None:
    z, everywhere = random_logits(seed=5), torch.ones(ROWS, VOCABULARY, dtype=torch.bool)
    plain = standardised(z, temperature=2.0, among=everywhere)
    torch.testing.assert_close(standardised(3 * z + 5, temperature=2.0, among=everywhere), plain, rtol=0, atol=1e-15)


def test_standardising_differentiates_through_mean_and_deviation() -> None:
    z, everywhere = random_logits(seed=5).requires_grad_(), torch.ones(ROWS, VOCABULARY, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda z: standardised(z, temperature=2.0, among=everywhere), (z,))


def test_standardising_equal_logits_gives_zeros_and_a_finite_gradient() -> None:
    z = torch.full((1, 4), 3.0).double().requires_grad_()
    flat = standardised(z, temperature=2.0, among=torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(flat, torch.zeros(1, 4).double())
    assert torch.autograd.grad(flat[0, 0], z)[0].isfinite().all()


def test_both_sides_are_standardised_over_the_ids_that_both_have() -> None:
    z, w = random_logits(seed=5), random_logits(seed=6)
    w[:, -1] = -math.inf
    student, teacher = applied(Standardised(temperature=2.0), student=z, teacher=w)
    torch.testing.assert_close(student[:, :-1].mean(-1), torch.zeros(ROWS).double())
    torch.testing.assert_close(student[:, :-1].std(-1, correction=0), torch.full((ROWS,), 0.5).double())
    assert (teacher[:, -1] == -math.inf).all()


def test_a_renormalised_support_is_tempered_and_standardised_as_if_its_gaps_were_not_there() -> None:
    z, w = random_logits(seed=7), random_logits(seed=8).log_softmax(-1)
    for target in (Tempered(student=2.0, teacher=0.5), Standardised(temperature=2.0)):
        narrow = apply_over(target, z, w)
        wide = apply_over(target, with_padding(z), with_padding(w))
        for found, expected in zip(wide, narrow, strict=True):
            torch.testing.assert_close(found, with_padding(expected))


def test_a_target_that_needs_the_vocabulary_refuses_a_support() -> None:
    with pytest.raises(ValueError, match="target 'taid' needs the whole vocabulary"):
        apply_over(Taid(), random_logits(seed=1), random_logits(seed=2))


def test_taid_at_0_teaches_nothing_and_at_1_is_the_forward_kl() -> None:
    z, w = random_logits(seed=9), random_logits(seed=10)
    assert gradient(Taid(), z, w, t=0.0).abs().max() < 1e-15
    torch.testing.assert_close(gradient(Taid(), z, w, t=1.0), z.softmax(-1) - w.softmax(-1))


def test_taid_between_pulls_towards_the_softmax_of_interpolated_logits() -> None:
    z, w = random_logits(seed=9), random_logits(seed=10)
    target = (0.75 * z + 0.25 * w).softmax(-1)
    torch.testing.assert_close(gradient(Taid(), z, w, t=0.25), z.softmax(-1) - target)


def test_taid_and_bridge_at_their_ends_survive_tokens_that_one_side_rules_out() -> None:
    z, w = random_logits(seed=9), random_logits(seed=10)
    ruled_out = torch.full_like(w[:, :1], -math.inf)
    w = torch.cat([ruled_out, w[:, 1:]], dim=-1)
    assert torch.equal(taid(z, w, t=0.0), z)
    assert torch.equal(taid(w, z, t=1.0), z)
    assert torch.equal(bridge(w, z, beta=0.0), z)


def test_one_hot_mix_is_a_distribution_with_its_share_of_the_teacher() -> None:
    w = random_logits(seed=11)
    target = one_hot_mix(w, TOKENS, share=0.3).exp()
    expected = 0.3 * w.softmax(-1) + 0.7 * torch.nn.functional.one_hot(TOKENS, VOCABULARY)
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(target.sum(-1), torch.ones(ROWS).double())


def test_one_hot_mix_at_its_ends_is_the_written_token_and_the_teacher() -> None:
    w = random_logits(seed=11)
    assert torch.equal(
        one_hot_mix(w, TOKENS, share=0.0).exp(), torch.nn.functional.one_hot(TOKENS, VOCABULARY).double()
    )
    torch.testing.assert_close(one_hot_mix(w, TOKENS, share=1.0), w.log_softmax(-1))


def test_a_ramp_of_the_share_is_read_at_the_step() -> None:
    z, w = random_logits(seed=1), random_logits(seed=11)
    ramp = OneHotMix(share=Ramp(start=0.0, end=0.8, from_step=1, to_step=5))
    _, found = applied(ramp, student=z, teacher=w, step=3)
    torch.testing.assert_close(found, one_hot_mix(w, TOKENS, share=0.4))


def test_swing_warms_each_row_by_how_private_it_is() -> None:
    w = random_logits(seed=12)
    _, found = applied(Swing(max_temperature=3.0), student=random_logits(seed=1), teacher=w)
    torch.testing.assert_close(found, torch.stack([w[0], w[1] / 2, w[2] / 3]))


def test_noise_leaves_a_row_that_is_not_private_exactly_alone_and_makes_distributions_of_the_others() -> None:
    w = random_logits(seed=12)
    _, found = applied(Swing(max_temperature=3.0, noise=0.05), student=random_logits(seed=1), teacher=w)
    warm = swing(w, PRIVACY, max_temperature=3.0)
    assert torch.equal(found[0], w[0])
    assert not torch.isclose(found[1:].softmax(-1), warm[1:].softmax(-1)).any()
    torch.testing.assert_close(found.softmax(-1).sum(-1), torch.ones(ROWS).double())


def test_noise_is_the_same_for_the_same_uniforms_in_any_company_and_another_for_others() -> None:
    w, scale = random_logits(seed=12), torch.full((ROWS,), 0.01).double()
    uniforms = torch.tensor([[0.1, 0.7], [0.1, 0.8], [0.2, 0.7]])
    whole = noisy(w, scale, uniforms)
    for row in range(ROWS):
        alone = slice(row, row + 1)
        assert torch.equal(noisy(w[alone], scale[alone], uniforms[alone]), whole[alone])
    same_logits = noisy(w[:1].expand(ROWS, -1), scale, uniforms)
    assert not torch.isclose(same_logits[0], same_logits[1]).any()
    assert not torch.isclose(same_logits[0], same_logits[2]).any()


def test_noise_is_laplace_of_the_given_scale() -> None:
    vocabulary, scale = 100_000, 1e-7
    flat = torch.zeros(1, vocabulary).double()
    drawn = noisy(flat, torch.tensor([scale]).double(), torch.tensor([[0.5]])).exp() - 1 / vocabulary
    ordered = (drawn[0] / scale).sort().values
    cumulative = torch.where(ordered < 0, 0.5 * ordered.exp(), 1 - 0.5 * (-ordered).exp())
    empirical = torch.arange(1, vocabulary + 1) / vocabulary
    assert (cumulative - empirical).abs().max() < 1.63 / math.sqrt(vocabulary)  # Kolmogorov, 1%
    neighbours = torch.corrcoef(torch.stack([drawn[0, 1:], drawn[0, :-1]]))[0, 1]
    assert neighbours.abs() < 4 / math.sqrt(vocabulary)


def test_bridge_is_the_teacher_times_a_power_of_the_student() -> None:
    z, w = random_logits(seed=13), random_logits(seed=14)
    _, found = applied(Bridge(beta=0.5), student=z, teacher=w)
    product = w.softmax(-1) * z.softmax(-1) ** 0.5
    torch.testing.assert_close(found.softmax(-1), product / product.sum(-1, keepdim=True))
    _, plain = applied(Bridge(beta=0.0), student=z, teacher=w)
    assert torch.equal(plain, w)
