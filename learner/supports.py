"""Which outcomes a divergence is taken over, and what stands for the rest of the vocabulary. Pure tensors.

Legend: C rows, V vocabulary, K ids of a support; q student, p teacher; log-probs in, unless a name says ids. A token
that is in a row only to fill it up, such as the second of two equal ids, is marked, and gets −inf on both sides.

The bucket for the rest keeps a truncated divergence a divergence: it is ≥ 0, at most the full one (data processing),
equal to it at K = V, and its minimum is p itself (SDPO, arXiv 2601.20802). Without it a top-k reverse KL pushes mass
out of the support, down to P/e, and a forward KL pulls all of it in.

This file chooses no support and takes no divergence; it never renormalises a student.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_bucket(kept: Tensor, rest: Tensor) -> Tensor:
    """[C, K] log-probs and [C] log of the mass outside them → [C, K+1]; the rest floored as in `log_rest`.

    Both sides of a divergence must be floored alike, or a teacher's empty bucket would make a reverse KL infinite.

    >>> with_bucket(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]).log()).exp()
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    floor = torch.finfo(kept.dtype).eps
    return torch.cat([kept, rest.clamp(min=_log(floor, kept)).unsqueeze(-1)], dim=-1)


def log_rest(kept: Tensor) -> Tensor:
    """log(1 − Σ exp(kept)) of [C, K] log-probs → [C], to a few roundings of 1; a row of −inf alone leaves all: 0.

    The rest is floored at the dtype's epsilon: rounding alone can make Σ exp(kept) exceed 1 by as much.

    >>> log_rest(torch.tensor([[0.5, 0.25]]).log()).exp()
    tensor([0.2500])
    """
    captured = kept.logsumexp(-1).clamp(max=-torch.finfo(kept.dtype).eps)
    return log1mexp(captured)


def log_outside(logp: Tensor, ids: Tensor) -> Tensor:
    """Log of the mass of [C, V] outside the ids [C, K], each counted once → [C]; −inf where nothing is left.

    A sum over the others, so it keeps its digits where `log_rest` has lost them; it needs the whole vocabulary.
    For the side without gradient: where nothing is left the gradient is NaN.

    >>> log_outside(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0, 0]])).exp()
    tensor([0.5000])
    """
    return logp.scatter(-1, ids, -torch.inf).logsumexp(-1)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0 (Mächler 2012, eq. 7), with finite gradients in both branches."""
    near = x > -0.6931471805599453
    from_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    from_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, from_expm1, from_log1p)


def union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of either row, [C, K] of distinct ids each → ids [C, 2K], and which of them are there a second time [C, 2K].

    >>> union(torch.tensor([[4, 1]]), torch.tensor([[1, 7]]))
    (tensor([[4, 1, 1, 7]]), tensor([[False, False,  True, False]]))
    """
    return torch.cat([a, b], dim=-1), torch.cat([torch.zeros_like(a, dtype=torch.bool), _is_in(b, a)], dim=-1)


def intersection(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of both rows, [C, K] of distinct ids each → a itself, and which of its ids b lacks [C, K]: perhaps all.

    >>> intersection(torch.tensor([[4, 1]]), torch.tensor([[1, 7]]))
    (tensor([[4, 1]]), tensor([[ True, False]]))
    """
    return a, ~_is_in(a, b)


def nucleus(logp: Tensor, mass: float) -> Tensor:
    """The smallest set that holds at least `mass` of each row of [C, V] → bool [C, V]; of equals, the lower ids.

    The upper cut of DAC-KL (arXiv 2407.10068) at a fixed place: the paper's clip is learnt, by a network it leaves
    unspecified. Raises ValueError for a mass outside (0, 1).

    >>> nucleus(torch.tensor([[0.1, 0.6, 0.3]]).log(), 0.8)
    tensor([[False,  True,  True]])
    """
    if not 0 < mass < 1:
        raise ValueError(f"the mass of a nucleus lies in (0, 1), not {mass}")
    ordered, order = logp.sort(dim=-1, descending=True, stable=True)
    reached = ordered.exp().cumsum(-1, dtype=torch.float64) >= mass
    wanted = torch.cat([torch.ones_like(reached[:, :1]), ~reached[:, :-1]], dim=-1)
    kept = wanted & (ordered > -torch.inf)  # rounding can keep the sum of all from reaching the mass
    return torch.zeros_like(kept).scatter(-1, order, kept)


def random_sampling(logp: Tensor, uniforms: Tensor, *, draws: int, head: int) -> tuple[Tensor, Tensor]:
    """An unbiased sparse target: ids [C, head + draws] and the logs of their weights, which sum to 1.

    Draws with replacement, weight count / draws (arXiv 2503.16870). With a head, its most probable tokens keep their
    p, and the draws are of the others, weighted by their mass: unbiased still, and of less variance.

    logp      [C, V] the teacher's
    uniforms  [C, ≥ draws] of [0, 1), in float64 for vocabularies whose rare tokens matter; the first `draws` are used,
              each turned into a token by the inverse of the distribution function, so that they alone decide

    A token that was drawn again has weight −inf. Σ weight · (−log q) has the full forward KL's gradient in expectation,
    q − p; its value is higher by the entropy that the sparse target lacks, and no other divergence is unbiased on it.
    Raises ValueError when the uniforms are too few.

    >>> p, uniforms = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.1, 0.9, 0.2, 0.3]])
    >>> ids, weights = random_sampling(p.log(), uniforms, draws=4, head=0)
    >>> ids, weights.exp()
    (tensor([[0, 0, 0, 1]]), tensor([[0.7500, 0.0000, 0.0000, 0.2500]]))
    """
    if uniforms.shape[-1] < draws:
        raise ValueError(f"{draws} draws at a position need as many uniforms, not {uniforms.shape[-1]}")
    top = logp.topk(head, dim=-1)
    others = logp.scatter(-1, top.indices, -torch.inf)
    drawn = _inverse_cdf(others, uniforms[:, :draws]).sort(dim=-1).values
    first = torch.searchsorted(drawn, drawn)
    count = torch.searchsorted(drawn, drawn, right=True) - first
    repeated = first != torch.arange(draws, device=drawn.device)
    share = (count.to(logp.dtype) / draws).log().masked_fill(repeated, -torch.inf)
    weights = torch.cat([top.values, share + others.logsumexp(-1, keepdim=True)], dim=-1)
    weights = weights.log_softmax(-1)  # float32 log-probs of 10⁵ tokens miss a sum of 1 by 1e-5
    return torch.cat([top.indices, drawn], dim=-1), weights


def _inverse_cdf(logp: Tensor, uniforms: Tensor) -> Tensor:
    """For each u the first token at which the distribution function exceeds u · total; never one of probability 0.

    A row without any mass yields its last token.
    """
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=logp.shape[-1] - 1)


def _is_in(ids: Tensor, others: Tensor) -> Tensor:
    """[C, K] whether each id is among the row's others [C, K']."""
    ordered = others.sort(dim=-1).values
    place = torch.searchsorted(ordered, ids).clamp(max=others.shape[-1] - 1)
    return ordered.gather(-1, place) == ids


def _log(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device).log()
