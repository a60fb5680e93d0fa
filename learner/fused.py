"""Divergences with their gradients written out: a few passes over the outcomes, in place, where autograd makes many.

Each formula takes what the function of the same name in learner/divergences.py takes, which stays the definition, and
gives its value [...] with g = ∂/∂(log q) [..., O] as stated there. It gives None for choices that it does not cover,
and a value that is not finite where it does not know what a zero means; the definition decides both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., tuple[Tensor, Tensor] | None]
Divergence = Callable[..., Tensor]


def fused(formula: Formula) -> Callable[[Divergence], Divergence]:
    """Decorates a divergence of log q, its first argument: by the formula where that gives finite values.

    The definition alone serves where another argument needs a gradient, or has to be expanded.
    """

    def decorate(definition: Divergence) -> Divergence:
        @wraps(definition)
        def divergence(logq: Tensor, *others: Tensor, **choices: Any) -> Tensor:
            if all(other.shape == logq.shape and not other.requires_grad for other in others):
                with torch.no_grad():
                    found = formula(logq, *others, **choices)
                if found is not None and bool(found[0].isfinite().all()):
                    return _WithGradient.apply(logq, *found)  # type: ignore[no-any-return, no-untyped-call]
            return definition(logq, *others, **choices)

        return divergence

    return decorate


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logq: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_value.unsqueeze(-1), None, None


def forward_kl(
    logq: Tensor, logp: Tensor, *, pointwise_clip: float | None, zero_sum: bool
) -> tuple[Tensor, Tensor] | None:
    p = logp.exp()
    terms = (logp - logq).mul_(p)
    if pointwise_clip is None:
        return terms.sum(-1), p.neg_()
    if zero_sum:
        return None
    clipped = terms > pointwise_clip
    return terms.clamp_(max=pointwise_clip).sum(-1), p.neg_().masked_fill_(clipped, 0.0)


def reverse_kl(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    q = logq.exp()
    terms = (logq - logp).mul_(q)
    return terms.sum(-1), terms.add_(q)


def jsd(logq: Tensor, logp: Tensor, *, beta: float) -> tuple[Tensor, Tensor] | None:
    if not 0 < beta < 1:
        return None
    q, p = logq.exp(), logp.exp()
    logm = _floored(torch.lerp(q, p, beta)).log_()
    of_p = _lowest(logp).sub_(logm).mul_(p).sum(-1)
    terms = _lowest(logq).sub_(logm).mul_(q)
    return beta * of_p + (1 - beta) * terms.sum(-1), terms.mul_(1 - beta)


def skew_forward_kl(logq: Tensor, logp: Tensor, *, alpha: float) -> tuple[Tensor, Tensor] | None:
    if not 0 < alpha < 1:
        return None
    q, p = logq.exp(), logp.exp()
    m = _floored(torch.lerp(q, p, alpha))
    gradient = q.mul_(p / m).mul_(alpha - 1)
    return _lowest(logp).sub_(m.log_()).mul_(p).sum(-1), gradient


def skew_reverse_kl(logq: Tensor, logp: Tensor, *, alpha: float, detach_mixture: bool) -> tuple[Tensor, Tensor] | None:
    if not 0 < alpha < 1:
        return None
    q = logq.exp()
    m = _floored(torch.lerp(logp.exp(), q, alpha))
    own = 0.0 if detach_mixture else alpha * (q / m)
    log_ratio = _lowest(logq).sub_(m.log_())
    return (log_ratio * q).sum(-1), log_ratio.add_(1).sub_(own).mul_(q)


def entropy(logq: Tensor) -> tuple[Tensor, Tensor]:
    q = logq.exp()
    terms = (q * logq).neg_()
    return terms.sum(-1), terms.sub_(q)


def _floored(mixture: Tensor) -> Tensor:
    """In place: where the mixture underflows its members weigh nothing, and its log need only be finite."""
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny)


def _lowest(logprob: Tensor) -> Tensor:
    """A copy with the lowest number for −inf, which times a weight of 0 is 0."""
    return logprob.clamp(min=torch.finfo(logprob.dtype).min)
