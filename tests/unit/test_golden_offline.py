"""Each offline preset has the loss and the gradient of its paper's equation, written out in loops.

Answers of different lengths over a vocabulary of six.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from potstill.methods import PRESETS
from tests.golden import evaluate, make_facts

LENGTHS = (3, 1, 4, 2)
TOKENS = (0, 5, 2, 2, 4, 1, 3, 0, 5, 5)
COMPLETIONS = ((0, 1, 2), (3,), (4, 5, 6, 7), (8, 9))  # their rows
VOCABULARY = 6


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT = drawn(len(TOKENS), VOCABULARY, seed=0)
REFERENCE = drawn(len(TOKENS), VOCABULARY, seed=1)


def likelihood(logits: Tensor, rows: tuple[int, ...]) -> Tensor:
    """log q(y | x) = Σ_t log q(y_t)."""
    total = torch.zeros((), dtype=torch.float64)
    for n in rows:
        total = total + (logits[n, TOKENS[n]].exp() / logits[n].exp().sum()).log()
    return total


def check_paper(found: tuple[float, Tensor], paper: Callable[[Tensor], Tensor]) -> None:
    z = STUDENT.clone().requires_grad_()
    loss = paper(z)
    assert found[0] == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(found[1], torch.autograd.grad(loss, z)[0], rtol=1e-9, atol=1e-12)


def learn(name: str, *, origins: tuple[str, ...], reference: Tensor = REFERENCE) -> tuple[float, Tensor]:
    """Completions 0 and 1 answer prompt "a", 2 and 3 prompt "b"."""
    facts = make_facts(
        LENGTHS,
        token_ids=TOKENS,
        origins=origins,
        prompts=("a", "a", "b", "b"),
        reference=torch.stack([likelihood(reference, (n,)) for n in range(len(TOKENS))]),
    )
    return evaluate(PRESETS[name].objective, STUDENT, facts)[:2]


OTHERS = ("others",) * 4


def of_answers(rows: tuple[tuple[int, ...], ...]) -> Callable[[Tensor], Tensor]:
    """−Σ_i log q(ŷ_i | x_i) over the tokens of the step: SeqKD's loss of the teacher's answers."""
    return lambda z: -sum(likelihood(z, answer) for answer in rows) / sum(len(answer) for answer in rows)


def test_sft_is_the_likelihood_of_whole_answers_over_the_tokens_of_the_step():
    check_paper(learn("sft", origins=OTHERS), of_answers(COMPLETIONS))


def test_sft_reads_nothing_that_the_student_wrote():
    found = learn("sft", origins=("others", "student", "others", "student"))
    check_paper(found, of_answers((COMPLETIONS[0], COMPLETIONS[2])))


def test_a_token_of_sft_weighs_the_same_in_a_short_answer_and_a_long_one():
    gradient = learn("sft", origins=OTHERS)[1]
    probabilities = STUDENT.softmax(-1)
    for n, token in enumerate(TOKENS):
        assert gradient[n, token].item() == pytest.approx((probabilities[n, token].item() - 1) / len(TOKENS))


def test_dasd_learns_the_students_prefix_as_it_learns_the_teachers_ending():
    """Of every answer the first half is the student's, cut where it was truncated; none of it is masked."""
    found = learn("dasd", origins=OTHERS)
    check_paper(found, of_answers(COMPLETIONS))
    endings = of_answers(tuple(rows[len(rows) // 2 :] for rows in COMPLETIONS))
    assert found[0] != pytest.approx(endings(STUDENT).item(), rel=1e-3)
    assert found[1][0].abs().max() > 0


PAIRED = ("others", "student", "student", "others")
PAIRS = ((0, 1), (3, 2))  # y⁺, y⁻


def soda(z: Tensor) -> Tensor:
    """Mean over pairs of −log σ(β log q(y⁺)/q_w(y⁺) − β log q(y⁻)/q_w(y⁻)), β = 0.1, sums over tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in PAIRS:
        good, bad = (
            likelihood(z, COMPLETIONS[side]) - likelihood(REFERENCE, COMPLETIONS[side]) for side in (chosen, rejected)
        )
        total = total - (1 / (1 + (-(0.1 * good - 0.1 * bad)).exp())).log() / len(PAIRS)
    return total


def test_soda_has_the_loss_and_the_gradient_of_its_paper():
    check_paper(learn("soda", origins=PAIRED), soda)


def test_soda_starts_at_log_2_and_pulls_by_half_of_beta_whatever_the_lengths():
    loss, gradient = learn("soda", origins=PAIRED, reference=STUDENT)
    assert loss == pytest.approx(math.log(2))
    z = STUDENT.clone().requires_grad_()
    difference = sum(likelihood(z, COMPLETIONS[good]) - likelihood(z, COMPLETIONS[bad]) for good, bad in PAIRS)
    torch.testing.assert_close(gradient, -(0.1 / 2) * torch.autograd.grad(difference, z)[0] / len(PAIRS))
