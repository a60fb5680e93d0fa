"""Outcomes over which a divergence is taken: a top-k of the vocabulary and one bucket for all the rest. Pure tensors.

Legend: N positions, V vocabulary, K ids of the support, K+1 outcomes. The bucket keeps a truncated divergence a
divergence: it is ≥ 0, at most the full one (data processing), equal to it at K = V, and its minimum is p itself
(algorithms §0, SDPO arXiv 2601.20802). Without it a top-k reverse KL pushes mass out of the support.
"""

from __future__ import annotations

import torch
from torch import Tensor


def outcomes(logits: Tensor, ids: Tensor) -> Tensor:
    """log q over the ids and the bucket: [N, V] logits, [N, K] distinct ids → [N, K+1] log-probs, differentiable."""
    kept = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    return with_bucket(kept, log_rest(kept))


def with_bucket(kept: Tensor, rest: Tensor) -> Tensor:
    """[N, K] log-probs and [N] log of the mass outside them → [N, K+1]; the rest floored as in `log_rest`.

    Both sides of a divergence must be floored alike, or a teacher's empty bucket would make a reverse KL infinite.
    """
    floor = torch.finfo(kept.dtype).eps
    return torch.cat([kept, rest.clamp(min=_log(floor, kept)).unsqueeze(-1)], dim=-1)


def log_rest(kept: Tensor) -> Tensor:
    """log(1 − Σ exp(kept)) of [N, K] log-probs → [N], accurate for both small and large rests.

    The rest is floored at the dtype's epsilon: rounding alone can make Σ exp(kept) exceed 1 by as much.
    """
    captured = kept.logsumexp(-1).clamp(max=-torch.finfo(kept.dtype).eps)
    return log1mexp(captured)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0 (Mächler 2012, eq. 7), with finite gradients in both branches."""
    near = x > -0.6931471805599453
    from_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    from_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, from_expm1, from_log1p)


def _log(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device).log()
