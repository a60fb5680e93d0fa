"""Losses that see only sampled tokens, and the advantage of such a token. Pure tensors, in nats.

They are named by what they are, and described by their gradient, because their values mislead. With q the student, p
the teacher, μ the sampler and δ = log p − log q of the token, averaged over what the sampler can write:

    −A log q, A = δ detached    ∇KL(q‖p) for μ = q; times ρ = q/μ, for any μ that reaches all of q
    k2 = ½ δ²                   ∇KL(q‖p) for μ = q
    ρ (e^δ − 1 − δ)             ∇KL(q‖p) for any such μ

Two estimates of the KL are not here. Differentiating k1 = −δ would not learn at all (its gradient has zero mean), and
k3 = e^δ − 1 − δ without ρ would learn the forward KL. This file knows no masks, weights or ratio bounds
(learner/corrections.py). Legend: C rows of a chunk, N loss tokens, M draws at a position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from learner.chunk import Chunk
from learner.divergences import reverse_kl
from learner.facts import Facts, Moment, known
from potstill.algebra.losses import PolicyGradient

_DEVIATION_FLOOR = 1e-6
"""Beside a group's deviation in the denominator, as in GRPO: a group that agrees has centred rewards of 0."""


def negative_log_likelihood(logq: Tensor) -> Tensor:
    """−log q of the written token. [C] → [C].

    >>> negative_log_likelihood(torch.tensor([-0.25, -3.0])).tolist()
    [0.25, 3.0]
    """
    return -logq


def policy_gradient(logq: Tensor, advantage: Tensor) -> Tensor:
    """Value −A, gradient −A ∇log q. [...], [...] → [...]; no gradient through the advantage.

    The value is A's alone, so that a mean over on-policy tokens with A = log p − log q reads as the reverse KL.

    >>> logq = torch.tensor(-2.0, requires_grad=True)
    >>> loss = policy_gradient(logq, torch.tensor(0.5))
    >>> loss.item(), torch.autograd.grad(loss, logq)[0].item()
    (-0.5, -0.5)
    """
    return -advantage.detach() * _one_with_gradient_of(logq)


def k2(logq: Tensor, logp: Tensor) -> Tensor:
    """½ (log p − log q)². [C], [C] → [C]. Value biased, gradient that of KL(q‖p) on-policy (KDRL, arXiv 2506.02208).

    >>> k2(torch.tensor(-1.0), torch.tensor(-3.0)).item()
    2.0
    """
    return 0.5 * (logp.detach() - logq).square()


def ratio_k3(logq: Tensor, logp: Tensor, log_behaviour: Tensor, *, clamp: float) -> Tensor:
    """ρ (e^δ − 1 − δ), both ρ and δ differentiable (Skill-SD, arXiv 2604.10674). [C] each → [C].

    δ = log p − log q is clamped to ±clamp. The gradient is written out: the terms in e^δ cancel and leave −ρ δ ∇log q.
    Left to autodiff they cancel only up to rounding, which at δ = 20 is more than δ itself in float32; and a plain
    clamp would cut one of the two, and push down, by e^20, a token that the teacher prefers.

    >>> logq = torch.tensor(0.25).log().requires_grad_()
    >>> loss = ratio_k3(logq, torch.tensor(0.5).log(), torch.tensor(0.25).log(), clamp=20.0)
    >>> round(loss.item(), 4), round(torch.autograd.grad(loss, logq)[0].item(), 4)
    (0.3069, -0.6931)
    """
    ratio = (logq - log_behaviour).detach().exp()
    delta = (logp - logq).detach().clamp(-clamp, clamp)
    return ratio * (delta.expm1() - delta) - ratio * delta * (logq - logq.detach())


def sampled_actions(
    logq: Tensor,
    logp: Tensor,
    log_behaviour: Tensor,
    *,
    scale: float,
    factor: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Mean over M independent draws of factor · policy gradient (AsyncOPD, arXiv 2606.24143). [C, M] each → [C].

    `factor` takes log ρ and the advantage, both [C, M] and detached. The advantage, scale · (log p − log q), is the
    current student's; with factor ρ the gradient is that of KL(q‖p) for any sampler, and its variance falls as 1/M.

    >>> logq, logp = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.0]])
    >>> sampled_actions(logq, logp, logq, scale=1.0, factor=lambda log_ratio, advantage: log_ratio.exp()).tolist()
    [0.0]
    """
    advantages = scale * (logp - logq).detach()
    log_ratios = (logq - log_behaviour).detach()
    return (factor(log_ratios, advantages) * policy_gradient(logq, advantages)).mean(-1)


def advantage(loss: PolicyGradient, chunk: Chunk, *, moment: Moment) -> Tensor:
    """[C], detached: what the written token is worth by itself, without what comes after it.

    distil · (score + baseline) + reward · A_RL at this moment, where the score is
        "log"    λ log p − log q + (1 − λ) log ref     whose optimum is q ∝ ref^(1−λ) p^λ (G-OPD, arXiv 2602.12125)
        "power"  p^a − q^a                             in [−1, 1] (PowerOPD, arXiv 2606.17199)
    the baseline is KL(q‖p) of the position (vOPD, arXiv 2605.07865), and A_RL the reward less its group's mean, with
    normalise = "std" over the group's deviation. What has weight 0 is not read. Raises ValueError for a fact that is
    missing, and for a "power" score with an extrapolation, which has no meaning.

    Nothing here runs under no_grad: the chunk keeps log q for those who come after, and they need its graph.
    """
    total = torch.zeros_like(chunk.written)
    if loss.distil != 0:
        total = total + _distilled(loss, chunk.written.detach(), chunk.fact)
    if loss.distil != 0 and loss.baseline == "kl":
        logp = chunk.other_logits("teacher").log_softmax(-1)
        total = total + loss.distil * reverse_kl(chunk.logq.detach(), logp)
    reward = moment.at(loss.reward)
    if reward != 0:
        centred = chunk.fact("reward")
        deviation = chunk.fact("reward_deviation") + _DEVIATION_FLOOR if loss.normalise == "std" else 1.0
        total = total + reward * centred / deviation
    return total


def future_advantage(loss: PolicyGradient, facts: Facts) -> Tensor | None:
    """[N], detached: Σ_{t'>t} γ^(t'−t) A_t' over later loss tokens of the same completion; None where there is none.

    A is the teacher's part of the advantage under `facts.student` (learner/look.py), for γ = 1 what the gradient of
    the sequence's KL has beside each token's own. A reward belongs to the whole completion already, and a baseline
    would cancel what is summed here: neither is in it. Time counts loss tokens: a tool's answer takes none.

    length_normalised: divided by the number of later tokens (MiniLLM, arXiv 2306.08543, prints T − t − 1; its code also
    counts the token itself, and TRL's port raises γ to t' instead of t' − t). The last token has no future: 0.

    >>> ids = torch.tensor([0, 1, 0])
    >>> facts = Facts(token_ids=ids, lengths=(3,), positions=torch.arange(3), origin=torch.zeros_like(ids),
    ...               student=torch.zeros(3), teacher=torch.tensor([5.0, 1.0, 2.0]))
    >>> future_advantage(PolicyGradient(discount=0.5), facts).tolist()
    [1.0, 1.0, 0.0]
    """
    if loss.discount == 0 or loss.distil == 0:
        return None
    student = known(facts.student, "student").detach()
    own = _distilled(loss, student, lambda name: known(getattr(facts, name), name))
    sums = _discounted_sums(pad_sequence(list(own.split_with_sizes(facts.lengths)), batch_first=True), loss.discount)
    later = loss.discount * pad(sums[:, 1:], (0, 1))  # [S, longest]
    lengths = torch.tensor(facts.lengths, device=later.device).unsqueeze(-1)
    index = torch.arange(later.shape[-1], device=later.device)
    if loss.length_normalised:
        later = later / (lengths - 1 - index).clamp(min=1)
    return later[index < lengths]


def _distilled(loss: PolicyGradient, student: Tensor, fact: Callable[[str], Tensor]) -> Tensor:
    """The teacher's part of the advantage; `student` is the current one's log q, `fact` reads the rest by name."""
    logq = fact("behaviour") if loss.student == "sampler" else student
    logp = fact("teacher")
    extrapolation = loss.extrapolation
    if loss.score == "power":
        if extrapolation != 1:
            raise ValueError(
                'loss.score "power" has no extrapolation; set loss.extrapolation = 1 or loss.score = "log"'
            )
        return loss.distil * ((loss.exponent * logp).exp() - (loss.exponent * logq).exp())
    score = extrapolation * logp - logq
    if extrapolation != 1:
        score = score + (1 - extrapolation) * fact("reference")
    return loss.distil * score


def _discounted_sums(values: Tensor, discount: float) -> Tensor:
    """Σ_{j≥0} γ^j x[s, t+j] for [S, L]. Each pass doubles how far a sum reaches, so log₂ L of them do."""
    reach = 1
    while reach < values.shape[-1]:
        values = values + discount**reach * pad(values[:, reach:], (0, reach))
        reach *= 2
    return values


def _one_with_gradient_of(logq: Tensor) -> Tensor:
    """1, whose gradient is that of log q: q over itself, detached, without the exponentials."""
    return 1 + logq - logq.detach()
