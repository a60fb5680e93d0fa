"""Each self-distilled preset has the loss and the gradient of its paper's equation, written out in loops.

Three completions of different lengths over a vocabulary of seven. The papers' equations call nothing of learner/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from learner.rewards import centred
from potstill.algebra.objective import Objective
from potstill.methods import PRESETS
from tests.golden import distribution, evaluate, make_facts

LENGTHS = (5, 1, 4)
TOKENS = (0, 6, 2, 2, 5, 1, 3, 4, 0, 6)
VOCABULARY = 7
K = 3
Paper = Callable[[Tensor], Tensor]


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT = drawn(len(TOKENS), VOCABULARY, seed=0)
TEACHER = drawn(len(TOKENS), VOCABULARY, seed=1, scale=1.5)
RATIOS = (1.15, 1.25, 0.5, 2.5, 0.85, 0.75, 0.85, 0.95, 1.15, 3.0)
"""Of student now and sampler, at the written tokens: on both sides of every clip."""


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def written(logits: Tensor) -> Tensor:
    """[N] log-probs of the written tokens."""
    return torch.stack([softmax(row)[token].log() for row, token in zip(logits, TOKENS, strict=True)])


def sampled() -> Tensor:
    """[N] the sampler's log-probs of the written tokens."""
    return written(STUDENT) - torch.tensor(RATIOS, dtype=torch.float64).log()


def completions() -> Iterator[list[int]]:
    """The rows of each completion."""
    start = 0
    for length in LENGTHS:
        yield list(range(start, start + length))
        start += length


def mean_of_means(loss: Callable[[int], Tensor]) -> Tensor:
    """1/S Σ_i 1/|y_i| Σ_t ℓ."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in completions():
        for n in rows:
            total = total + loss(n) / len(rows) / len(LENGTHS)
    return total


def mean_of_tokens(loss: Callable[[int], Tensor]) -> Tensor:
    """Σ_i Σ_t ℓ / Σ_i |y_i|."""
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(TOKENS)):
        total = total + loss(n) / len(TOKENS)
    return total


def narrow(name: str) -> Objective:
    """The preset with a top-k that is smaller than the vocabulary."""
    objective = PRESETS[name].objective
    if not hasattr(objective.support, "k"):
        return objective
    assert objective.support.k >= VOCABULARY
    return objective.model_copy(update={"support": objective.support.model_copy(update={"k": K})})


def top(n: int) -> list[int]:
    """The student's top-k at a row."""
    return STUDENT[n].topk(K).indices.tolist()


def opsd(z: Tensor) -> Tensor:
    """(1/|ŷ|) Σ_n Σ_v min(p_v (log p_v − log q_v), τ)."""

    def clipped(n: int) -> Tensor:
        p, q = softmax(TEACHER[n]), softmax(z[n])
        cap = torch.tensor(0.05, dtype=torch.float64)
        return sum(torch.minimum(p[v] * (p[v].log() - q[v].log()), cap) for v in range(VOCABULARY))

    return mean_of_means(clipped)


def jensen_shannon(q: Tensor, p: Tensor) -> Tensor:
    """½ KL(p‖m) + ½ KL(q‖m), m = ½p + ½q."""
    m = 0.5 * p + 0.5 * q
    return sum(0.5 * a * (a / c).log() + 0.5 * b * (b / c).log() for a, b, c in zip(p, q, m, strict=True))


def opsd_jsd(z: Tensor) -> Tensor:
    return mean_of_means(lambda n: jensen_shannon(softmax(z[n]), softmax(TEACHER[n])))


def opsd_reverse(z: Tensor) -> Tensor:
    """(1/|ŷ|) Σ_n Σ_v q_v (log q_v − log p_v)."""

    def divergence(n: int) -> Tensor:
        p, q = softmax(TEACHER[n]), softmax(z[n])
        return sum(q[v] * (q[v].log() - p[v].log()) for v in range(VOCABULARY))

    return mean_of_means(divergence)


def opsd_sampled(z: Tensor) -> Tensor:
    """−(1/|ŷ|) Σ_n A_n q/sg(q), A_n = sg(log p − log q): the gradient of −A log q, and −A for a value."""
    logq, logp = written(z), written(TEACHER)
    return mean_of_means(lambda n: -(logp[n] - logq[n]).detach() * (logq[n] - logq[n].detach()).exp())


def with_tail(probabilities: Tensor, ids: list[int]) -> Tensor:
    """K + 1 outcomes: the ids, and all else."""
    kept = torch.stack([probabilities[v] for v in ids])
    return torch.cat([kept, (1 - kept.sum()).reshape(1)])


def capped_ratio(z: Tensor, n: int) -> Tensor:
    """min(exp(sg(log π_θ − log μ)), 2)."""
    return (written(z) - sampled())[n].detach().exp().clamp(max=2.0)


def sdpo(z: Tensor) -> Tensor:
    """token_mean(w · JSD_½(T, P)) over the student's top-K and a tail."""

    def loss(n: int) -> Tensor:
        return capped_ratio(z, n) * jensen_shannon(
            with_tail(softmax(z[n]), top(n)), with_tail(softmax(TEACHER[n]), top(n))
        )

    return mean_of_tokens(loss)


def sdpo_rich(z: Tensor) -> Tensor:
    """token_mean(w · KL(P‖T)) over the student's top-K and a tail."""

    def loss(n: int) -> Tensor:
        q, p = with_tail(softmax(z[n]), top(n)), with_tail(softmax(TEACHER[n]), top(n))
        return capped_ratio(z, n) * sum(b * (b / a).log() for a, b in zip(p, q, strict=True))

    return mean_of_tokens(loss)


def sdft(z: Tensor) -> Tensor:
    """E_y Σ_{t>3} KL(π_θ(·|x) ‖ π(·|x, c)): the first three tokens of an answer are skipped."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in completions():
        for n in rows[3:]:
            p, q = softmax(TEACHER[n]), softmax(z[n])
            total = total + sum(q[v] * (q[v] / p[v]).log() for v in range(VOCABULARY))
    return total / len(LENGTHS)


def opcd(z: Tensor) -> Tensor:
    """(1/|y|) Σ_t Σ_{v in top-k} q_v (log q_v − log p_v): neither side renormalised."""

    def loss(n: int) -> Tensor:
        p, q = softmax(TEACHER[n]), softmax(z[n])
        return sum(q[v] * (q[v] / p[v]).log() for v in top(n))

    return mean_of_means(loss)


REWARDS = (1.0, 0.0, 0.25)  # of one prompt's group
GROUP_MEAN = sum(REWARDS) / 3
GROUP_DEVIATION = (sum((r - GROUP_MEAN) ** 2 for r in REWARDS) / 3) ** 0.5


def skill_sd(z: Tensor) -> Tensor:
    """L_GRPO + λ mean_t ρ_t (e^{−ℓ_t} − 1 + ℓ_t), ℓ = log π_θ − log π_θ̄(·|x, S); ρ and ℓ differentiable.

    A token that PPO's clip leaves flat adds no constant here, as in learner/corrections.py.
    """
    logq, logp, sampler = written(z), written(TEACHER), sampled()
    advantages = [(r - GROUP_MEAN) / (GROUP_DEVIATION + 1e-6) for r in REWARDS]
    owner = [i for i, rows in enumerate(completions()) for _ in rows]

    def loss(n: int) -> Tensor:
        ratio, advantage = (logq[n] - sampler[n]).exp(), advantages[owner[n]]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        flat = bool(surrogate < ratio * advantage)
        gap = logq[n] - logp[n]
        return -(surrogate - surrogate.detach() * flat) + 0.001 * ratio * ((-gap).exp() - 1 + gap)

    return mean_of_tokens(loss)


PAPERS: dict[str, Paper] = {
    "opsd": opsd,
    "opsd_jsd": opsd_jsd,
    "opsd_reverse": opsd_reverse,
    "opsd_sampled": opsd_sampled,
    "sdpo": sdpo,
    "sdpo_rich": sdpo_rich,
    "sdft": sdft,
    "opcd": opcd,
    "skill_sd": skill_sd,
}


def run(objective: Objective) -> tuple[float, Tensor]:
    reward, deviation = centred(torch.tensor(REWARDS), ["prompt"] * 3)
    counts = torch.tensor(LENGTHS)
    facts = make_facts(
        LENGTHS,
        token_ids=TOKENS,
        behaviour=sampled(),
        reward=reward.repeat_interleave(counts),
        reward_deviation=deviation.repeat_interleave(counts),
        **distribution(TEACHER),
    )
    return evaluate(objective, STUDENT, facts)[:2]


def expected(paper: Paper) -> tuple[Tensor, Tensor]:
    z = STUDENT.clone().requires_grad_()
    loss = paper(z)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("name", PAPERS)
def test_the_loss_and_its_gradient_are_those_of_the_paper(name: str):
    value, gradient = expected(PAPERS[name])
    found_value, found_gradient = run(narrow(name))
    assert found_value == pytest.approx(value.item(), rel=1e-9)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PAPERS)
def test_completions_of_different_length_are_added_up_as_the_paper_does(name: str):
    objective = narrow(name)
    kind = "sequence_mean" if objective.aggregation.kind == "token_mean" else "token_mean"
    raw = objective.model_dump() | {"aggregation": kind}
    other = run(Objective.model_validate(raw))[1]
    assert not torch.allclose(other, expected(PAPERS[name])[1], rtol=1e-3)


def test_the_pointwise_clip_of_opsd_cuts_some_outcomes_here_and_not_others():
    terms = TEACHER.softmax(-1) * (TEACHER.log_softmax(-1) - STUDENT.log_softmax(-1))
    assert 0 < (terms > 0.05).sum() < terms.numel() / 2


def test_a_token_whose_terms_are_clipped_is_pushed_slightly_down_by_opsd():
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    counted = p * (p / q).log() <= 0.05
    per_row = q * (p * counted).sum(-1, keepdim=True) - p * counted
    lengths = torch.tensor(LENGTHS).repeat_interleave(torch.tensor(LENGTHS))
    torch.testing.assert_close(run(narrow("opsd"))[1], per_row / (len(LENGTHS) * lengths.unsqueeze(-1)))


@pytest.mark.parametrize("name", sorted(set(PAPERS) - {"skill_sd"}))
def test_a_teacher_that_knows_no_more_than_the_student_teaches_nothing(name: str):
    facts = make_facts(LENGTHS, token_ids=TOKENS, behaviour=sampled(), **distribution(STUDENT))
    objective = narrow(name)
    if name == "opcd":  # left-out mass pushes even a perfect student out of its top-k
        assert evaluate(objective, STUDENT, facts)[1].abs().max() > 1e-3
        objective = objective.model_copy(update={"support": objective.support.model_copy(update={"rest": "tail"})})
    loss, gradient, _ = evaluate(objective, STUDENT, facts)
    assert loss == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
