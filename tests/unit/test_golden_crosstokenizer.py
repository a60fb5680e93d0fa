"""Each preset for a teacher with another tokenizer against its equation, written out token by token.

`q` is the student's distribution at a token, as scalars with gradient; Q the same numbers without. Two completions, of
four tokens in three chunks and of three tokens in two; a teacher of another tokenizer has one number for each chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.algebra.objective import Objective
from potstill.methods import PRESETS
from tests.golden import evaluate, make_facts

LENGTHS, WRITTEN = (4, 3), [0, 3, 1, 6, 2, 2, 5]
CHUNKS = [[0], [1, 2], [3], [4, 5], [6]]  # the tokens of each
CHUNK_OF = [0, 1, 1, 2, 3, 3, 4]
TEACHER = [-0.2, -2.4, -30.0, -0.05, -1.0]  # of each chunk; the third is what a clamp is for
TOKENS = range(7)
LOG_RATIO = [0.1, -0.4, 0.5, 0.3, 0.2, 0.6, -0.5]  # log q/μ; some are outside 0.8 … 1.28

STUDENT = 1.5 * torch.randn(7, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Distribution = Sequence[Any]


def softmax(logits: Distribution) -> list[Any]:
    raised = [torch.exp(z) for z in logits]
    return [x / sum(raised) for x in raised]


Q = [[x.item() for x in softmax(row)] for row in STUDENT]


def log_q(z: Tensor, t: int) -> Any:
    return torch.log(softmax(z[t])[WRITTEN[t]])


def check_paper(objective: Objective, expected: Callable[[Tensor], Any], **fields: Any) -> None:
    """Loss and gradient are those of the equation, which reads the student's logits [7, 7]."""
    z = STUDENT.clone().requires_grad_()
    value = expected(z)
    facts = make_facts(
        LENGTHS,
        token_ids=WRITTEN,
        teacher=torch.tensor([TEACHER[chunk] for chunk in CHUNK_OF], dtype=torch.float64),
        chunks=torch.tensor(CHUNK_OF),
        **fields,
    )
    loss, gradient, _ = evaluate(objective, STUDENT, facts)
    assert loss == pytest.approx(value.item(), rel=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(value, z)[0], rtol=1e-9, atol=1e-13)


def test_cross_tokenizer_clamps_and_clips_the_advantage_of_each_token_of_a_chunk():
    advantages, kept = [], []
    for chunk, tokens in enumerate(CHUNKS):
        L_S = sum(math.log(Q[t][WRITTEN[t]]) for t in tokens)
        for t in tokens:
            A = (TEACHER[chunk] / L_S - 1) * math.log(Q[t][WRITTEN[t]])
            advantages.append(max(-10.0, min(10.0, A)))
            ratio = math.exp(LOG_RATIO[t])
            kept.append(not (ratio > 1.28 and A > 0) and not (ratio < 0.8 and A < 0))
    assert -10.0 in advantages
    assert kept.count(False) >= 2

    def ppo(z: Tensor) -> Any:
        """The gradient of −min(ρA, clip(ρ)A), and no value where it is clipped."""
        ratios = [math.exp(LOG_RATIO[t]) * torch.exp(log_q(z, t) - math.log(Q[t][WRITTEN[t]])) for t in TOKENS]
        return sum(-ratios[t] * advantages[t] for t in TOKENS if kept[t]) / 7

    behaviour = [math.log(Q[t][WRITTEN[t]]) - LOG_RATIO[t] for t in TOKENS]
    check_paper(PRESETS["cross_tokenizer"].objective, ppo, behaviour=torch.tensor(behaviour, dtype=torch.float64))


def cross_entropy(z: Tensor, chunk: int) -> Any:
    """Between e^(L_T/τ) and e^(L_S/τ), τ = 100."""
    p = math.exp(TEACHER[chunk] / 100)
    q = torch.exp(sum(log_q(z, t) for t in CHUNKS[chunk]) / 100)
    return -p * torch.log(q) - (1 - p) * torch.log(1 - q)


def test_alm_is_the_cross_entropy_of_every_chunk_and_the_texts_likelihood():
    def alm(z: Tensor) -> Any:
        means = [sum(cross_entropy(z, chunk) for chunk in own) / len(own) for own in ([0, 1, 2], [3, 4])]
        return sum(means) / 2 - sum(log_q(z, t) for t in TOKENS) / 7

    check_paper(PRESETS["alm"].objective, alm, origins=["others"] * 2)


def test_the_hybrid_is_a_jsd_where_the_top_k_is_there_and_a_cross_entropy_of_the_other_chunks():
    """Tokens 0 and 6 are one token on both sides; the teacher's third entry at the first has no equal here."""
    topk: dict[int, dict[int, float]] = {0: {0: 0.6, 4: 0.3}, 6: {5: 0.4, 1: 0.3, 2: 0.2}}
    nothing = [-1, -1, -1]
    ids = [[0, -1, 4], nothing, nothing, nothing, nothing, nothing, [5, 1, 2]]
    probs = [[topk.get(t, {}).get(token, math.nan) for token in row] for t, row in enumerate(ids)]
    tails = [1 - sum(topk[t].values()) if t in topk else math.nan for t in TOKENS]

    def kl(a: Distribution, b: Distribution) -> Any:
        return sum(x * torch.log(torch.as_tensor(x / y)) for x, y in zip(a, b, strict=True))

    def jsd(z: Tensor, t: int) -> Any:
        q = [softmax(z[t])[token] for token in topk[t]]
        p, q = [*topk[t].values(), tails[t]], [*q, 1 - sum(q)]
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (kl(p, m) + kl(q, m)) / 2

    def hybrid(z: Tensor) -> Any:
        tokens_per_chunk = {1: 4 / 3, 2: 4 / 3, 3: 3 / 2}
        spans = sum(tokens_per_chunk[chunk] * cross_entropy(z, chunk) for chunk in (1, 2, 3))
        return (jsd(z, 0) + jsd(z, 6) + spans) / 7

    check_paper(
        PRESETS["cross_tokenizer_hybrid"].objective,
        hybrid,
        topk_ids=torch.tensor(ids),
        teacher_topk=torch.tensor(probs, dtype=torch.float64).log(),
        topk_rest=torch.tensor(tails, dtype=torch.float64).log(),
    )
