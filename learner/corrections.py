"""Factors for text that another policy wrote. Pure tensors, detached: they weigh a gradient and never carry one.

ρ = q/μ is the current student over the sampler, as it was when it sampled. A factor of one token is known when its row
is; a factor of a completion needs all of its tokens first (learner/look.py), and is settled with the weights. For any
correction one of the two functions is 1, so that no ratio counts twice. Log-ratios are clamped to ±20, beyond which a
ratio says only that something is wrong. A NaN log-ratio stays NaN: it is never masked away.

Legend: C rows of a chunk, N loss tokens of S completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.facts import Facts, known
from potstill.algebra.corrections import Clipped, Correction, GeometricRejection, Masked, Truncated, Unclipped

LOG_RATIO_BOUND = 20.0
"""Nats, of a token and of the sum over a completion."""


def token_factor(correction: Correction, log_ratio: Tensor, advantage: Tensor | None) -> Tensor:
    """Factor of each token, the shape of log_ratio ([C], or [C, M] for draws); 1 where it is the completion's.

        unclipped    ρ
        truncated    min(ρ, cap)                            TIS
        masked       ρ where low ≤ ρ ≤ high, else 0         IcePop
        clipped      ρ, and 0 where it left the trust region on the side to which the advantage pushes

    The last has the gradient of PPO's min(ρA, clip(ρ, 1 − low, 1 + high) A) (arXiv 1707.06347, eq. 7), whose value
    there is a constant and not 0; it raises ValueError without an advantage.

    >>> log_ratio = torch.tensor([0.5, 1.0, 4.0]).log()
    >>> token_factor(Truncated(cap=2.0), log_ratio, None).tolist()
    [0.5, 1.0, 2.0]
    >>> token_factor(Masked(low=0.6, high=2.0), log_ratio, None).tolist()
    [0.0, 1.0, 0.0]
    """
    ratio = _clamped(log_ratio).exp()
    match correction:
        case Unclipped():
            return ratio
        case Truncated(level="token", cap=cap):
            return ratio.clamp(max=cap)
        case Masked(level="token", low=low, high=high):
            return ratio * _within(ratio, low, high)
        case Clipped(low=low, high=high):
            if advantage is None:
                raise ValueError('correction "clipped" needs an advantage; use "truncated"')
            left = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
            return ratio * ~left
    return torch.ones_like(ratio)


def sequence_factor(correction: Correction, facts: Facts, read: Tensor) -> Tensor:
    """Factor of each token's completion, [N] float64, the same for all its tokens; 1 where it is the token's.

        truncated             min(w, cap)                       w = Π ρ over the completion's tokens that are read
        masked                w where low ≤ w ≤ high, else 0    MIS
        geometric_rejection   1 where low ≤ w^(1/n) ≤ high, else 0, for n such tokens

    read [N] bool: rows that are not read may hold NaN, and a completion without any other has w = 1. Raises ValueError
    when the facts lack the student's log-probs (learner/look.py) or the sampler's.
    """
    match correction:
        case Truncated(level="sequence", cap=cap):
            factor = _product(facts, read).clamp(max=cap)
        case Masked(level="sequence", low=low, high=high):
            product = _product(facts, read)
            factor = product * _within(product, low, high)
        case GeometricRejection(low=low, high=high):
            counts = _sums(read.double(), facts).clamp(min=1)
            mean = (_sums(_log_ratio(facts, read), facts) / counts).exp()
            factor = torch.where(mean.isnan(), mean, _within(mean, low, high).double())
        case _:
            return torch.ones(len(read), dtype=torch.float64, device=read.device)
    return factor[facts.sequence]


def _product(facts: Facts, read: Tensor) -> Tensor:
    """[S] Π ρ. The sum is clamped as its terms are: exp of a long completion's would overflow."""
    return _clamped(_sums(_log_ratio(facts, read), facts)).exp()


def _log_ratio(facts: Facts, read: Tensor) -> Tensor:
    """[N] float64, clamped; 0 where the row is not read and may hold NaN."""
    log_ratio = known(facts.student, "student").detach().double() - known(facts.behaviour, "behaviour").double()
    return _clamped(log_ratio).masked_fill(~read, 0.0)


def _sums(values: Tensor, facts: Facts) -> Tensor:
    """[N] → [S] summed over each completion."""
    return torch.stack([part.sum() for part in values.split_with_sizes(facts.lengths)])


def _within(ratio: Tensor, low: float, high: float) -> Tensor:
    return (ratio >= low) & (ratio <= high)


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
