"""DPO row by row has the value and the gradient of DPO written out over whole completions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.facts import ORIGINS, Facts
from learner.pairs import bradley_terry, preference, sequence_sums
from potstill.algebra.losses import Preference

BETA = 0.3


def facts(
    *,
    lengths: Sequence[int],
    origins: Sequence[str],
    prompts: Sequence[str],
    student: Tensor | None = None,
    reference: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Facts:
    """Completions of these lengths; log-probs are zeros unless given."""
    tokens = sum(lengths)
    origin = [ORIGINS[name] for name, length in zip(origins, lengths, strict=True) for _ in range(length)]
    return Facts(
        token_ids=torch.zeros(tokens, dtype=torch.int64) if token_ids is None else token_ids,
        lengths=tuple(lengths),
        positions=torch.tensor([t for length in lengths for t in range(length)]),
        origin=torch.tensor(origin),
        student=torch.zeros(tokens, dtype=torch.float64) if student is None else student,
        reference=torch.zeros(tokens, dtype=torch.float64) if reference is None else reference,
        prompts=tuple(prompts),
    )


SIX = {
    "lengths": (3, 1, 5, 2, 4, 7),
    "origins": ("student", "others", "others", "student", "student", "others"),
    "prompts": ("a", "c", "a", "b", "c", "b"),
}
PAIRS_OF_SIX = ((2, 0), (1, 4), (5, 3))  # (chosen, rejected)


def logprobs(tokens: int, *, seed: int) -> Tensor:
    return -4 * torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def added_up(found: Facts, written: Tensor, *, beta: float = BETA, chunk: int = 5) -> Tensor:
    """The objective under sequence_sum: every row weighs 1 / num_sequences; a few rows at a time."""
    pairs = preference(found, Preference(beta=beta))
    rows = torch.arange(len(written)).split(chunk)
    return torch.cat([pairs.loss(written[part], part) for part in rows]).sum() / len(found.lengths)


def literal_dpo(
    written: Tensor, reference: Tensor, lengths: Sequence[int], pairs: Sequence[tuple[int, int]], *, beta: float
) -> Tensor:
    """Rafailov et al., eq. 7, completion by completion."""
    q = [part.sum() for part in written.split(list(lengths))]
    ref = [part.sum() for part in reference.split(list(lengths))]
    losses = [-logsigmoid(beta * (q[c] - ref[c]) - beta * (q[r] - ref[r])) for c, r in pairs]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("chunk", [1, 5, 22])
def test_rows_add_up_to_dpo_in_value_and_gradient(beta: float, chunk: int) -> None:
    student, reference = logprobs(22, seed=1), logprobs(22, seed=2)
    found = facts(**SIX, student=student, reference=reference)
    written = student.clone().requires_grad_()
    expected = literal_dpo(written, reference, SIX["lengths"], PAIRS_OF_SIX, beta=beta)
    loss = added_up(found, written, beta=beta, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, written), torch.autograd.grad(expected, written))


def test_each_completion_carries_the_loss_of_its_pair() -> None:
    student, reference = logprobs(22, seed=3), logprobs(22, seed=4)
    found = facts(**SIX, student=student, reference=reference)
    rows = preference(found, Preference(beta=BETA)).loss(student, torch.arange(22))
    sums = sequence_sums(rows, found)
    for chosen, rejected in PAIRS_OF_SIX:
        one = literal_dpo(student, reference, SIX["lengths"], [(chosen, rejected)], beta=BETA)
        torch.testing.assert_close(sums[[chosen, rejected]], one.expand(2))


def test_at_the_reference_the_loss_is_log_2_and_the_pull_is_half_of_beta_each_way() -> None:
    student = logprobs(22, seed=5)
    found = facts(**SIX, student=student, reference=student)
    written = student.clone().requires_grad_()
    loss = added_up(found, written)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    signs = torch.tensor([-1.0 if origin == "others" else 1.0 for origin in SIX["origins"]], dtype=torch.float64)
    expected = BETA / 2 * signs.repeat_interleave(torch.tensor(SIX["lengths"])) / len(PAIRS_OF_SIX)
    torch.testing.assert_close(torch.autograd.grad(loss, written)[0], expected)


def test_a_text_preferred_to_itself_teaches_nothing() -> None:
    """The two completions are the same tokens, whose log-probs come from the same logits."""
    z = torch.tensor([0.5, -1.0, 0.2, 0.0], dtype=torch.float64, requires_grad=True)
    token_ids = torch.tensor([2, 0, 3, 2, 0, 3])
    written = z.log_softmax(-1)[token_ids]
    found = facts(
        lengths=(3, 3),
        origins=("others", "student"),
        prompts=("a", "a"),
        student=written.detach(),
        reference=logprobs(3, seed=6).repeat(2),
        token_ids=token_ids,
    )
    loss = added_up(found, written)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-16


def test_a_margin_of_hundreds_of_nats_is_neither_infinite_nor_without_gradient() -> None:
    reference = torch.zeros(2, dtype=torch.float64)
    for student, slope in (((-2000.0, 0.0), 2 * BETA), ((0.0, -2000.0), 0.0)):
        found = facts(
            lengths=(1, 1),
            origins=("others", "student"),
            prompts=("a", "a"),
            student=torch.tensor(student, dtype=torch.float64),
            reference=reference,
        )
        pairs = preference(found, Preference(beta=BETA))
        assert pairs.value.isfinite().all()
        torch.testing.assert_close(pairs.slope, torch.tensor([-slope, slope], dtype=torch.float64))


@pytest.mark.parametrize(
    ("origins", "prompts", "counted"),
    [
        (("others", "student", "student"), ("a", "a", "a"), "2 of 'student', 1 of 'others'"),
        (("others", "student", "student"), ("a", "a", "b"), "prompt 'b' has 1 of 'student'"),
        (("others", "student", "privileged"), ("a", "a", "a"), "1 of 'student', 1 of 'privileged', 1 of 'others'"),
        (("others", "others", "student"), ("a", "b", "b"), "prompt 'a' has 1 of 'others'"),
    ],
)
def test_a_prompt_without_exactly_one_completion_of_each_side_is_refused(
    origins: Sequence[str], prompts: Sequence[str], counted: str
) -> None:
    with pytest.raises(ValueError, match=counted):
        preference(facts(lengths=(1, 2, 1), origins=origins, prompts=prompts), Preference(beta=BETA))


def test_a_completion_without_loss_tokens_makes_no_pair() -> None:
    origins, prompts = ("others", "student", "student"), ("a", "a", "b")
    assert len(preference(facts(lengths=(1, 2, 0), origins=origins, prompts=prompts), Preference(beta=BETA)).value) == 3
    with pytest.raises(ValueError, match="prompt 'a' has 1 of 'student'"):
        preference(facts(lengths=(0, 2, 0), origins=origins, prompts=prompts), Preference(beta=BETA))


@pytest.mark.parametrize("missing", ["student", "reference", "prompts"])
def test_what_was_not_gathered_is_named(missing: str) -> None:
    found = dataclasses.replace(facts(**SIX), **{missing: None})
    with pytest.raises(ValueError, match=f"facts.{missing}, which is missing"):
        preference(found, Preference(beta=BETA))


def test_sums_over_completions_are_those_of_a_loop_and_zero_for_an_empty_one() -> None:
    values = logprobs(6, seed=7).float()
    found = facts(lengths=(2, 0, 4), origins=("student",) * 3, prompts=("a", "b", "c"))
    sums = sequence_sums(values, found)
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx([math.fsum(values[:2].tolist()), 0.0, math.fsum(values[2:].tolist())])


def test_bradley_terry_is_log_2_at_equal_scores_and_pulls_both_apart_equally() -> None:
    chosen = torch.tensor([0.7, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.7, 1.0, -30.0], dtype=torch.float64, requires_grad=True)
    losses = bradley_terry(chosen, rejected)
    expected = [math.log1p(math.exp(r - c)) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert losses[0].item() == pytest.approx(math.log(2), rel=1e-12)
    up, down = torch.autograd.grad(losses.sum(), (chosen, rejected))
    torch.testing.assert_close(up, -down)
    assert up[0].item() == pytest.approx(-0.5)


def test_bradley_terry_separates_scores_that_can_be_separated() -> None:
    """A discriminator that is linear in one feature, larger in the teacher's texts on the whole."""
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(2, 64, 3, dtype=torch.float64, generator=generator)
    features[0, :, 1] += 6
    direction = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([direction], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        bradley_terry(*(features @ direction)).mean().backward()
        optimizer.step()
    teacher, student = features @ direction.detach()
    assert (teacher.unsqueeze(1) > student).double().mean() > 0.99
