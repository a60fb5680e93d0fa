"""Losses that compare how two distributions rank outcomes, or the shape they have when sorted. Pure tensors.

Legend: q student, p teacher, O outcomes. Shapes [..., O] in, [...] out. Gradients flow through log q: detach the
teacher. An outcome that is −inf on both sides is not in the row's support and adds 0 to value and gradient.

This file does not rank: it is given the order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def plackett_luce(logq: Tensor, logp: Tensor, order: Tensor, *, weighted: bool) -> Tensor:
    """−log of the probability that draws from q without replacement come in this order: Σ_k [lse_{l ≥ k} s_l − s_k].

    order [..., O] outcome indices, best first; s = log q in that order. The logsumexp runs over the suffix: what is
    still to be drawn. A constant added to log q changes nothing. weighted multiplies rank k's term by p of its outcome
    (PLD, arXiv 2506.12542; 0 at C = 1, cross-entropy times p of the first at C = 2); without, TSD-KD's indirect term
    (arXiv 2603.13260), whose official code takes the prefix instead, which rewards the reversed ranking.

    An outcome that the teacher alone rules out has no rank: it waits in the suffixes before it, without a term of its
    own. One that q rules out is in neither.

    >>> q = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> round(plackett_luce(q, q, torch.tensor([0, 1, 2]), weighted=False).exp().item(), 4)  # 1 / (0.5 · 0.3 / 0.5)
    3.3333
    """
    scores, weights = logq.gather(-1, order), logp.gather(-1, order)
    unranked = (scores == -math.inf) | (weights == -math.inf)
    drawable = scores.clamp(min=torch.finfo(scores.dtype).min)  # the gradient of logcumsumexp is NaN at −inf
    suffix = drawable.flip(-1).logcumsumexp(-1).flip(-1)
    terms = (suffix - drawable).masked_fill(unranked, 0.0)
    return (weights.exp() * terms if weighted else terms).sum(-1)


def sorted_l1(logq: Tensor, logp: Tensor) -> Tensor:
    """Σ_i |q_(i) − p_(i)|, both sorted downwards (ULD, arXiv 2402.12030). Between 0 and 2.

    [..., O] and [..., O']: the shorter vocabulary is filled up with zeros. It compares shapes, not outcomes: a
    permutation of the teacher costs nothing.

    >>> p = torch.tensor([0.25, 0.75]).log(); q = torch.tensor([0.75, 0.25]).log()
    >>> sorted_l1(q, p).item()
    0.0
    """
    outcomes = max(logq.shape[-1], logp.shape[-1])
    return (_falling(logq, outcomes) - _falling(logp, outcomes)).abs().sum(-1)


def _falling(logprobs: Tensor, length: int) -> Tensor:
    return pad(logprobs.exp().sort(dim=-1, descending=True).values, (0, length - logprobs.shape[-1]))
