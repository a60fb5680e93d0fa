"""Each preset for several teachers against its equation, written out token by token and outcome by outcome.

`q` is the student's distribution at a token, as scalars with gradient; Q the same numbers without, and TEACHERS those
of each teacher, so that what a paper detaches is a plain float here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.ensemble import average_of_logits, average_of_probabilities, routed, teacher_of
from learner.facts import Logits
from potstill.algebra.objective import Objective
from potstill.methods.multiple import MULTIPLE
from tests.golden import evaluate, make_facts

LENGTHS = (3, 1, 2)
TOKENS = range(6)
WRITTEN = [0, 3, 1, 6, 2, 2]
TOKEN_MEAN = [1 / 6] * 6
SEQUENCE_MEAN = [1 / 9] * 3 + [1 / 3] + [1 / 6] * 2
LOG_RATIO = [0.1, 1.0, -1.0, 0.6, -0.3, 0.05]  # log q/μ: the second is above the mask, the third below

_random = torch.Generator().manual_seed(11)
STUDENT, MATHS, CODE = (1.5 * torch.randn(6, 7, generator=_random, dtype=torch.float64) for _ in range(3))

Distribution = Sequence[Any]


def softmax(logits: Distribution) -> list[Any]:
    raised = [torch.exp(z) for z in logits]
    return [x / sum(raised) for x in raised]


def floats(logits: Tensor) -> list[list[float]]:
    return [[x.item() for x in softmax(row)] for row in logits]


Q, TEACHERS = floats(STUDENT), {"maths": floats(MATHS), "code": floats(CODE)}


def kl(a: Distribution, b: Distribution) -> Any:
    logs = [[torch.log(x) if isinstance(x, Tensor) else math.log(x) for x in side] for side in (a, b)]
    return sum(x * (log_a - log_b) for x, log_a, log_b in zip(a, *logs, strict=True))


def check_paper(
    objective: Objective,
    token_loss: Callable[[Distribution, int], Any],
    weights: Sequence[float],
    *,
    teacher: Logits,
    **fields: Any,
) -> None:
    """Loss and gradient are those of Σ weight · token_loss; token_loss reads the student's logits."""
    z = STUDENT.clone().requires_grad_()
    expected = sum(weights[t] * token_loss(z[t], t) for t in TOKENS)
    facts = make_facts(LENGTHS, token_ids=WRITTEN, teacher_logits=teacher, **fields)
    loss, gradient, _ = evaluate(objective, STUDENT, facts)
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], rtol=1e-9, atol=1e-13)


def together(average: Callable[[list[Tensor], list[float]], Tensor], weights: list[float]) -> Logits:
    """Both teachers as one."""
    return lambda rows: average([MATHS[rows], CODE[rows]], weights)


@pytest.mark.parametrize("reward", [0.0, 0.5])
def test_mopd_asks_each_domains_teacher_and_drops_tokens_whose_ratio_left_the_mask(reward: float):
    domains, earned = ["code", "maths", "code"], [0.5, 0.0, -0.5]
    sequence = [0, 0, 0, 1, 2, 2]
    assert [0.5 <= math.exp(x) <= 2.0 for x in LOG_RATIO].count(False) == 2

    def mopd(logits: Distribution, t: int) -> Any:
        y, ratio = WRITTEN[t], math.exp(LOG_RATIO[t])
        weight = ratio if 0.5 <= ratio <= 2.0 else 0.0
        outcome = earned[sequence[t]] / (0.5 + 1e-6) if sequence[t] != 1 else 0.0
        A = math.log(TEACHERS[domains[sequence[t]]][t][y]) - math.log(Q[t][y]) + reward * outcome
        return -weight * A * softmax(logits)[y] / Q[t][y]  # the gradient of −w A log q

    objective = MULTIPLE["mopd"].objective
    which = teacher_of(domains, {"maths": 0, "code": 1})[torch.tensor(sequence)]
    check_paper(
        objective.model_copy(update={"loss": objective.loss.model_copy(update={"reward": reward})}),
        mopd,
        SEQUENCE_MEAN,
        teacher=routed([lambda rows: MATHS[rows], lambda rows: CODE[rows]], which),
        behaviour=torch.tensor([math.log(Q[t][WRITTEN[t]]) - LOG_RATIO[t] for t in TOKENS], dtype=torch.float64),
        reward=torch.tensor([earned[s] for s in sequence], dtype=torch.float64),
        reward_deviation=torch.tensor([0.0 if s == 1 else 0.5 for s in sequence], dtype=torch.float64),
    )


def test_multi_teacher_is_a_reverse_kl_to_the_weighted_mean_of_probabilities():
    def reverse_kl(logits: Distribution, t: int) -> Any:
        mean = [0.25 * a + 0.75 * b for a, b in zip(TEACHERS["maths"][t], TEACHERS["code"][t], strict=True)]
        return kl(softmax(logits), mean)

    teacher = together(average_of_probabilities, [0.25, 0.75])
    check_paper(MULTIPLE["multi_teacher"].objective, reverse_kl, TOKEN_MEAN, teacher=teacher)


def test_baby_llama_halves_a_tempered_forward_kl_to_the_mean_of_logits_and_the_cross_entropy():
    def baby_llama(logits: Distribution, t: int) -> Any:
        mean = [(a + b) / 2 for a, b in zip(MATHS[t], CODE[t], strict=True)]
        p, q = ([x / sum(raised) for x in raised] for raised in ([torch.exp(z / 2) for z in s] for s in (mean, logits)))
        return 0.5 * 2**2 * kl(p, q) - 0.5 * torch.log(softmax(logits)[WRITTEN[t]])

    teacher = together(average_of_logits, [0.5, 0.5])
    check_paper(MULTIPLE["baby_llama"].objective, baby_llama, TOKEN_MEAN, teacher=teacher, origins=["others"] * 3)
