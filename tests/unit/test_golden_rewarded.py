"""Each rewarded preset has the loss and the gradient of its paper's equation, written out in loops.

Four completions of two prompts over a vocabulary of six; for π-Distill they are two texts, each under two prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.pairs import bradley_terry
from learner.rewards import centred, penalised
from potstill.algebra.objective import Objective
from potstill.methods import PRESETS
from tests.golden import evaluate, make_facts

LENGTHS = (3, 1, 4, 2)
TOKENS = (0, 5, 2, 2, 4, 1, 3, 0, 5, 5)
REWARDS = (1.0, 0.0, 0.2, 0.9)
PROMPTS = ("a", "a", "b", "b")
COMPLETIONS = ((0, 1, 2), (3,), (4, 5, 6, 7), (8, 9))  # their rows
VOCABULARY = 6


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT = drawn(len(TOKENS), VOCABULARY, seed=0)
TEACHER = drawn(len(TOKENS), VOCABULARY, seed=1, scale=1.5)
REFERENCE = STUDENT + drawn(len(TOKENS), VOCABULARY, seed=3)
RATIOS = (1.15, 1.25, 0.7, 0.75, 0.85, 0.75, 1.25, 1.1, 0.85, 1.15)
"""Of student now and sampler, at the written tokens: on both sides of every clip, for good texts and bad."""


def written(logits: Tensor) -> Tensor:
    """[N] log-probs of the written tokens."""
    return torch.stack([(row[t].exp() / row.exp().sum()).log() for row, t in zip(logits, TOKENS, strict=True)])


def sampled() -> Tensor:
    """[N] the sampler's log-probs of the written tokens."""
    return written(STUDENT) - torch.tensor(RATIOS, dtype=torch.float64).log()


def grouped(rewards: list[float]) -> list[float]:
    """(R − mean of its prompt's) / (deviation + 1e-6)."""
    advantages = []
    for reward, prompt in zip(rewards, PROMPTS, strict=True):
        group = [r for r, other in zip(rewards, PROMPTS, strict=True) if other == prompt]
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / len(group))
        advantages.append((reward - mean) / (deviation + 1e-6))
    return advantages


def surrogate(logq: Tensor, log_sampler: Tensor, advantage: float) -> Tensor:
    """min(ρA, clip(ρ, 0.8, 1.2) A), less its value where it is flat: such a token adds no constant to our loss."""
    ratio = (logq - log_sampler).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return clipped - clipped.detach() * bool(clipped < ratio * advantage)


def mean_of_means(loss: Callable[[int, int], Tensor], completions: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    """1/G Σ_i 1/|o_i| Σ_t ℓ(i, n), n the row."""
    total = torch.zeros((), dtype=torch.float64)
    for i in completions:
        for n in COMPLETIONS[i]:
            total = total + loss(i, n) / len(COMPLETIONS[i]) / len(completions)
    return total


def grpo(z: Tensor) -> Tensor:
    """−(1/G) Σ 1/|o| Σ min(ρA, clip(ρ)A)."""
    logq, sampler, advantages = written(z), sampled(), grouped(list(REWARDS))
    return mean_of_means(lambda i, n: -surrogate(logq[n], sampler[n], advantages[i]))


def kdrl(z: Tensor) -> Tensor:
    """−(J_GRPO − β k2), k2 = ½ (log p − log q)², β = 2e-3."""
    logq, logp = written(z), written(TEACHER)
    return grpo(z) + 2e-3 * mean_of_means(lambda _, n: 0.5 * (logp[n] - logq[n]) ** 2)


def rlsd(z: Tensor) -> Tensor:
    """Â_t = A · clip(exp(sign(A) Δ_t), 1 − ε, 1 + ε) inside PPO's minimum, Δ = sg(log p_T − log p_S)."""
    logq, logp, sampler, advantages = written(z), written(TEACHER), sampled(), grouped(list(REWARDS))

    def loss(i: int, n: int) -> Tensor:
        gap = (logp[n] - logq[n]).item()
        weight = min(max(math.exp(math.copysign(1, advantages[i]) * gap), 0.8), 1.2)
        return -surrogate(logq[n], sampler[n], advantages[i] * weight)

    return mean_of_means(loss)


def ratio_k3(logq: Tensor, logp: Tensor, log_sampler: Tensor) -> Tensor:
    """ρ (p/q − 1 − log p/q), everything of q differentiable."""
    return (logq - log_sampler).exp() * ((logp - logq).exp() - 1 - (logp - logq))


def rl_opsd(z: Tensor) -> Tensor:
    """−PG(R) + β ρ k3(log π_S, sg(log π_T)), β = 0.25."""
    logq, logp, sampler = written(z), written(TEACHER), sampled()
    return grpo(z) + 0.25 * mean_of_means(lambda _, n: ratio_k3(logq[n], logp[n], sampler[n]))


def gad(z: Tensor) -> Tensor:
    """The generator's: GRPO of the discriminator's score, and 0.001 of the KL to the reference."""
    logq, reference, sampler = written(z), written(REFERENCE), sampled()
    return grpo(z) + 0.001 * mean_of_means(lambda _, n: ratio_k3(logq[n], reference[n], sampler[n]))


def run(objective: Objective, **fields: Any) -> tuple[float, Tensor]:
    counts = torch.tensor(LENGTHS)
    reward, deviation = centred(torch.tensor(REWARDS, dtype=torch.float64), PROMPTS)
    given = {
        "behaviour": sampled(),
        "teacher": written(TEACHER),
        "reference": written(REFERENCE),
        "reward": reward.repeat_interleave(counts),
        "reward_deviation": deviation.repeat_interleave(counts),
        "prompts": PROMPTS,
    }
    facts = make_facts(LENGTHS, token_ids=TOKENS, **(given | fields))
    return evaluate(objective, STUDENT, facts, step=11)[:2]  # gad's reward has no weight before


def check_against_paper(found: tuple[float, Tensor], paper: Callable[[Tensor], Tensor]) -> None:
    z = STUDENT.clone().requires_grad_()
    loss = paper(z)
    assert found[0] == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(found[1], torch.autograd.grad(loss, z)[0], rtol=1e-9, atol=1e-12)


PAPERS = {"grpo": grpo, "kdrl": kdrl, "rlsd": rlsd, "rl_opsd": rl_opsd, "gad": gad}


@pytest.mark.parametrize("name", PAPERS)
def test_the_loss_and_its_gradient_are_those_of_the_paper(name: str):
    check_against_paper(run(PRESETS[name].objective), PAPERS[name])


@pytest.mark.parametrize("name", PAPERS)
def test_completions_of_different_length_weigh_the_same(name: str):
    objective = PRESETS[name].objective
    raw = objective.model_dump() | {"aggregation": "token_mean"}
    raw["auxiliaries"] = {key: term | {"aggregation": "token_mean"} for key, term in raw["auxiliaries"].items()}
    other, own = run(Objective.model_validate(raw)), run(objective)
    assert not torch.allclose(own[1], other[1], rtol=1e-3)
    weights = torch.cat([torch.full((n,), len(TOKENS) / (len(LENGTHS) * n)) for n in LENGTHS]).unsqueeze(-1)
    torch.testing.assert_close(own[1], weights.double() * other[1])


# π-Distill: text 0 under the student's prompt, then under the privileged one; then text 1 the same.
TEXTS = ((0, 5, 2), (4, 1))
VIEWS = ("student", "privileged", "student", "privileged")
PI_TOKENS = TEXTS[0] + TEXTS[0] + TEXTS[1] + TEXTS[1]
PI_ROWS = ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9))
PI_REWARDS = (1.0, 0.3)
ALPHA, BETA = 0.5, 0.25
PI_RATIOS = {0: 1.15, 4: 1.15, 2: 1.25, 6: 0.85, 9: 0.85}
"""By row: of its view now and the privileged sampler. One view of each token; the other follows."""


def pi_written(logits: Tensor) -> Tensor:
    return torch.stack([(row[t].exp() / row.exp().sum()).log() for row, t in zip(logits, PI_TOKENS, strict=True)])


def pi_old() -> Tensor:
    """[N] log-probs under each view when the text was written."""
    now = pi_written(STUDENT)
    old = now + drawn(len(now), seed=2, scale=0.7)
    for own, privileged in ((PI_ROWS[0], PI_ROWS[1]), (PI_ROWS[2], PI_ROWS[3])):
        for n_s, n_t in zip(own, privileged, strict=True):
            n = n_s if n_s in PI_RATIOS else n_t
            old[n_t] = now[n] - math.log(PI_RATIOS[n])
    return old


def pi_distill(z: Tensor) -> Tensor:
    """−α clipPG(log π_T, R̃) − (1 − α) clipPG(log π_S, R̃) + (1 − α) β KL(sg π_T ‖ π_S), both over π_T,old.

    R̃ = R − β mean_t(log π_T − log π_S), over its group's deviation; the KL is of written tokens, less sg log π_T.
    """
    logq, old = pi_written(z), pi_old()
    punished = []
    for text, reward in enumerate(PI_REWARDS):
        own, privileged = PI_ROWS[2 * text], PI_ROWS[2 * text + 1]
        gaps = [(old[n_t] - old[n_s]).item() for n_s, n_t in zip(own, privileged, strict=True)]
        punished.append(reward - BETA * sum(gaps) / len(gaps))
    mean = sum(punished) / 2
    deviation = math.sqrt(sum((r - mean) ** 2 for r in punished) / 2)
    total = torch.zeros((), dtype=torch.float64)
    for text, reward in enumerate(punished):
        advantage = (reward - mean) / (deviation + 1e-6)
        own, privileged = PI_ROWS[2 * text], PI_ROWS[2 * text + 1]
        for n_s, n_t in zip(own, privileged, strict=True):
            share = 1 / (len(TEXTS) * len(own))
            total = total - ALPHA * share * surrogate(logq[n_t], old[n_t], advantage)
            total = total - (1 - ALPHA) * share * surrogate(logq[n_s], old[n_t], advantage)
            total = total - (1 - ALPHA) * BETA * share * logq[n_s]
    return total


def pi_run(objective: Objective) -> tuple[float, Tensor]:
    old = pi_old()
    of_student = [old[list(PI_ROWS[i])] for i in (0, 2)]
    of_teacher = [old[list(PI_ROWS[i])] for i in (1, 3)]
    rewards = penalised(torch.tensor(PI_REWARDS).double(), of_teacher, of_student, kl_penalty=BETA)
    reward, deviation = centred(rewards[[0, 0, 1, 1]], ["prompt"] * 4)
    counts = torch.tensor([len(rows) for rows in PI_ROWS])
    facts = make_facts(
        counts.tolist(),
        token_ids=PI_TOKENS,
        origins=VIEWS,
        behaviour=torch.cat([of_teacher[0], of_teacher[0], of_teacher[1], of_teacher[1]]),  # who wrote it
        reward=reward.repeat_interleave(counts),
        reward_deviation=deviation.repeat_interleave(counts),
    )
    return evaluate(objective, STUDENT, facts)[:2]


def test_pi_distill_has_the_loss_and_the_gradient_of_its_paper():
    objective = PRESETS["pi_distill"].objective
    assert objective.loss.kl_penalty == objective.auxiliaries["teacher"].loss.kl_penalty == BETA
    check_against_paper(pi_run(objective), pi_distill)


def test_pi_distill_with_all_weight_on_the_teacher_has_no_gradient_through_the_students_prompt():
    objective = PRESETS["pi_distill"].objective
    follow = objective.auxiliaries["follow"].model_copy(update={"weight": 0.0})
    alone = objective.model_copy(
        update={"weight": 0.0, "auxiliaries": objective.auxiliaries | {"follow": follow}},
    )
    gradient = pi_run(alone)[1]
    assert gradient[[0, 1, 2, 6, 7]].abs().max() == 0
    assert gradient[[3, 4, 5, 8, 9]].abs().max() > 0


def test_rlsd_without_evidence_is_grpo_and_never_turns_a_token_around():
    objective = PRESETS["rlsd"].objective
    bare, gated = run(objective.model_copy(update={"gates": ()})), run(objective)
    torch.testing.assert_close(bare[1], run(PRESETS["grpo"].objective)[1])
    assert not torch.allclose(bare[1], gated[1])
    assert (bare[1] * gated[1] >= 0).all()


def test_a_discriminator_learns_by_bradley_terry_and_its_constant_does_not_reach_the_generator():
    teachers, students = drawn(5, seed=6, scale=2).requires_grad_(), drawn(5, seed=7, scale=2).requires_grad_()
    paper = sum((1 + (-(t - s)).exp()).log() for t, s in zip(teachers, students, strict=True)) / 5
    expected = torch.autograd.grad(paper, (teachers, students))
    found = bradley_terry(teachers, students).mean()
    assert found.item() == pytest.approx(paper.item(), rel=1e-9)
    for one, other in zip(torch.autograd.grad(found, (teachers, students)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert bradley_terry(teachers[0], teachers[0]).item() == pytest.approx(math.log(2))
    plain, shifted = (centred(students.detach() + shift, list("aabbb")) for shift in (0.0, 3.0))
    torch.testing.assert_close(plain, shifted)
