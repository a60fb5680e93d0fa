"""Divergences between two distributions given as log-probabilities over the same outcomes. Pure tensors.

Legend: q student, p teacher, O outcomes (the vocabulary, or a top-k and one bucket for the rest); every row of
exp(logq) and exp(logp) sums to 1. Shapes [..., O] in, [...] out, in nats. Gradients flow through whatever requires
grad: detach the teacher. An outcome with p = 0 or q = 0 contributes its limit, 0, where the limit exists.

This file knows no masks, weights or batches, and never renormalises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(logq: Tensor, logp: Tensor, *, pointwise_clip: float | None) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q); covers the teacher's modes. ∂/∂z = q − p for q = softmax(z).

    pointwise_clip caps each outcome's term before the sum (OPSD, arXiv 2601.18734 v3). The sum may then be negative,
    and a clipped outcome is pushed slightly down: ∂/∂z_v = q_v·P_U − p_v·1[v ∈ U] with U the unclipped outcomes.

    >>> p = torch.tensor([0.5, 0.5]).log(); q = torch.tensor([0.25, 0.75]).log()
    >>> round(forward_kl(q, p, pointwise_clip=None).item(), 4)
    0.1438
    """
    terms = _expected(logp, logp - logq)
    return (terms if pointwise_clip is None else terms.clamp(max=pointwise_clip)).sum(-1)


def reverse_kl(logq: Tensor, logp: Tensor) -> Tensor:
    """KL(q‖p) = Σ q (log q − log p); seeks a mode. ∂/∂z_v = q_v [(log q_v − log p_v) − KL].

    >>> p = torch.tensor([0.5, 0.5]).log(); q = torch.tensor([0.25, 0.75]).log()
    >>> round(reverse_kl(q, p).item(), 4)
    0.1308
    """
    return _expected(logq, logq - logp).sum(-1)


def jsd(logq: Tensor, logp: Tensor, *, beta: float) -> Tensor:
    """β KL(p‖m) + (1 − β) KL(q‖m) with m = βp + (1 − β)q (GKD, arXiv 2306.13649, eq. 1).

    Divided by β it tends to the forward KL as β → 0, divided by 1 − β to the reverse KL as β → 1; at both ends the
    value itself tends to 0, so β outside (0, 1) raises ValueError. At β = ½ it is at most log 2.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie in (0, 1), not {beta}: its limits are forward_kl and reverse_kl")
    lowest = torch.finfo(logq.dtype).min  # logaddexp of two -inf has a NaN gradient
    logm = torch.logaddexp(logp.clamp(min=lowest) + math.log(beta), logq.clamp(min=lowest) + math.log1p(-beta))
    return beta * _expected(logp, logp - logm).sum(-1) + (1 - beta) * _expected(logq, logq - logm).sum(-1)


def entropy(logq: Tensor) -> Tensor:
    """−Σ q log q, in nats."""
    return -_expected(logq, logq).sum(-1)


def _expected(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) · value, and 0 where the weight is 0, in value and in gradient."""
    empty = log_weight == -math.inf
    return log_weight.exp() * value.masked_fill(empty, 0.0)
