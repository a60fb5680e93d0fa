"""Divergences between two distributions given as log-probabilities over the same outcomes. Pure tensors.

Legend: q student, p teacher, O outcomes (the vocabulary, or a top-k and perhaps one bucket for the rest). Shapes
[..., O] in, [...] out, in nats. Rows may sum to less than 1 (a partial support); a divergence may then be negative.

Zeros: an outcome that is −inf on both sides is not in the row's support and adds 0 to value and gradient. One that only
the teacher rules out makes the reverse KL, and what is made of it, infinite; one that only the student rules out makes
the forward KL so. The mixtures (JSD, skew with α > 0) stay finite. A NaN stays a NaN.

Gradients flow through log q: detach the teacher. Docstrings give g_v = ∂/∂(log q_v), with the entries of log q taken as
free; for q = softmax(z) that makes ∂/∂z = g − q Σ g. learner/fused.py has most of them without autograd.

This file knows no masks, weights or batches, and never renormalises, but for forward_kl's zero-sum clip.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner import fused as by_hand
from learner.fused import fused


@fused(by_hand.forward_kl)
def forward_kl(logq: Tensor, logp: Tensor, *, pointwise_clip: float | None, zero_sum: bool) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q); covers the teacher's modes. g = −p.

    pointwise_clip caps each outcome's term before the sum (OPSD, arXiv 2601.18734 v3). The sum may then be negative,
    and a clipped outcome is pushed slightly down: ∂/∂z_v = q_v P_U − p_v 1[v ∈ U], with U the unclipped outcomes and
    P_U their mass. With zero_sum both sides are renormalised on U instead, P_U KL(p_U‖q_U): not negative, and
    ∂/∂z_v = q_v P_U / Q_U − p_v on U, 0 elsewhere. Without a clip zero_sum changes nothing.

    >>> p = torch.tensor([0.5, 0.5]).log(); q = torch.tensor([0.25, 0.75]).log()
    >>> round(forward_kl(q, p, pointwise_clip=None, zero_sum=False).item(), 4)
    0.1438
    """
    terms = _expected(logp, logp - logq)
    if pointwise_clip is None:
        return terms.sum(-1)
    if not zero_sum:
        return terms.clamp(max=pointwise_clip).sum(-1)
    clipped = terms > pointwise_clip  # never true of a NaN, which must reach the sum
    log_mass_p, log_mass_q = _log_mass(logp, clipped), _log_mass(logq, clipped)
    return terms.masked_fill(clipped, 0.0).sum(-1) - log_mass_p.exp() * (log_mass_p - log_mass_q)


@fused(by_hand.reverse_kl)
def reverse_kl(logq: Tensor, logp: Tensor) -> Tensor:
    """KL(q‖p) = Σ q (log q − log p); seeks a mode. g = q (log q − log p + 1).

    >>> p = torch.tensor([0.5, 0.5]).log(); q = torch.tensor([0.25, 0.75]).log()
    >>> round(reverse_kl(q, p).item(), 4)
    0.1308
    """
    return _expected(logq, logq - logp).sum(-1)


@fused(by_hand.jsd)
def jsd(logq: Tensor, logp: Tensor, *, beta: float) -> Tensor:
    """β KL(p‖m) + (1 − β) KL(q‖m) with m = βp + (1 − β)q (GKD, arXiv 2306.13649). g = (1 − β) q log(q/m).

    Divided by β it tends to the forward KL as β → 0, divided by 1 − β to the reverse KL as β → 1, while the value
    itself tends to 0 at both ends. β = 0 therefore means the forward KL and β = 1 the reverse KL, as in TRL: the value
    jumps there. At β = ½ it is at most log 2. Raises ValueError for β outside [0, 1].

    >>> p = torch.tensor([1.0, 0.0]).log(); q = torch.tensor([0.0, 1.0]).log()
    >>> round(jsd(q, p, beta=0.5).item(), 4)  # log 2
    0.6931
    """
    if beta == 0:
        return forward_kl(logq, logp, pointwise_clip=None, zero_sum=False)
    if beta == 1:
        return reverse_kl(logq, logp)
    logm = _log_mixture(logp, logq, share=beta)
    return beta * _expected(logp, logp - logm).sum(-1) + (1 - beta) * _expected(logq, logq - logm).sum(-1)


@fused(by_hand.skew_forward_kl)
def skew_forward_kl(logq: Tensor, logp: Tensor, *, alpha: float) -> Tensor:
    """KL(p‖m) with m = αp + (1 − α)q (DistiLLM, arXiv 2402.03898). g = −(1 − α) p q/m.

    At most −log α whatever the supports; α = 0 is the forward KL. DistiLLM's code leaves out the constant Σ p log p,
    so what it logs is no divergence; here it is in. Raises ValueError for α outside [0, 1).

    >>> p = torch.tensor([1.0, 0.0]).log(); q = torch.tensor([0.0, 1.0]).log()
    >>> round(skew_forward_kl(q, p, alpha=0.1).item(), 4)  # −log 0.1
    2.3026
    """
    if alpha == 0:
        return forward_kl(logq, logp, pointwise_clip=None, zero_sum=False)
    return _expected(logp, logp - _log_mixture(logp, logq, share=alpha)).sum(-1)


@fused(by_hand.skew_reverse_kl)
def skew_reverse_kl(logq: Tensor, logp: Tensor, *, alpha: float, detach_mixture: bool) -> Tensor:
    """KL(q‖m) with m = (1 − α)p + αq (DistiLLM, arXiv 2402.03898). g = q (log(q/m) + 1 − αq/m).

    At most −log α whatever the supports; α = 0 is the reverse KL. The paper differentiates through the student inside
    m; DistiLLM-2's code (arXiv 2503.07067) does not: detach_mixture, g = q (log(q/m) + 1). Raises ValueError for α
    outside [0, 1).

    >>> p = torch.tensor([1.0, 0.0]).log(); q = torch.tensor([0.0, 1.0]).log()
    >>> round(skew_reverse_kl(q, p, alpha=0.1, detach_mixture=False).item(), 4)  # −log 0.1
    2.3026
    """
    if alpha == 0:
        return reverse_kl(logq, logp)
    logm = _log_mixture(logq.detach() if detach_mixture else logq, logp, share=alpha)
    return _expected(logq, logq - logm).sum(-1)


def balanced_kl(logq: Tensor, logp: Tensor, *, sharpness: float) -> Tensor:
    """w KL(q‖p) + (1 − w) KL(p‖q) with w = σ(sharpness · (H_q − H_p)), a constant (after BD-KD, arXiv 2212.12965).

    A student less sure than its teacher seeks a mode, a surer one covers. The paper weighs whole samples with steps;
    here each row has its own, smooth, weight. g = w q (log q − log p + 1) − (1 − w) p.

    >>> p = torch.tensor([0.25, 0.75]).log(); q = torch.tensor([0.75, 0.25]).log()  # equally sure: half of each
    >>> round(balanced_kl(q, p, sharpness=1.0).item(), 4)
    0.5493
    """
    reverse_share = torch.sigmoid(sharpness * (entropy(logq) - entropy(logp))).detach()
    forward = forward_kl(logq, logp, pointwise_clip=None, zero_sum=False)
    return reverse_share * reverse_kl(logq, logp) + (1 - reverse_share) * forward


@fused(by_hand.entropy)
def entropy(logq: Tensor) -> Tensor:
    """−Σ q log q. g = −q (log q + 1)."""
    return -_expected(logq, logq).sum(-1)


def _expected(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) · value, and 0 where the weight is 0, in value and in gradient."""
    empty = log_weight == -math.inf
    return log_weight.exp() * value.masked_fill(empty, 0.0)


def _log_mixture(log_a: Tensor, log_b: Tensor, *, share: float) -> Tensor:
    """log(share · a + (1 − share) · b). Raises ValueError for a share outside (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"a share of a mixture lies in (0, 1), not {share}")
    return torch.logaddexp(_finite(log_a) + math.log(share), _finite(log_b) + math.log1p(-share))


def _log_mass(log_weight: Tensor, dropped: Tensor) -> Tensor:
    """log of the mass that is not dropped, [..., O] → [...]; a huge negative number where all is."""
    return _finite(log_weight.masked_fill(dropped, -math.inf)).logsumexp(-1)


def _finite(log_weight: Tensor) -> Tensor:
    """−inf as the lowest number, which weighs as little and, among its like, has a gradient that is not NaN."""
    return log_weight.clamp(min=torch.finfo(log_weight.dtype).min)
