"""Losses of chunks: tokens that a teacher of another tokenizer scored together. Pure tensors, in nats.

A chunk is a piece of text that ends with a token on both sides, so that both have a log-prob of it: the sum of their
tokens', whatever these are. The student's is a constant of the step (learner/look.py), as a chunk may lie across those
that a loss sees at a time. Without `facts.chunks` each token is a chunk, which is the case of equal tokenizers.

This file aligns nothing and masks nothing: the tokens of a chunk are all here. Legend: N loss tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.facts import Facts, known
from learner.pairs import Linearised, sequence_sums
from learner.supports import log1mexp

SURE = 1e-8
"""Nats. A chunk that costs the student less is shared out evenly (arXiv 2606.09456): of nothing there are no shares."""

FLOOR = 1e-6
"""Of −log p / τ: a probability nearer to 1 is taken for this (ALM, arXiv 2503.20083)."""


def credit(facts: Facts) -> Tensor:
    """[N] float64 advantage of each token, not clamped: log p̂ − log q (arXiv 2606.09456).

    log p̂ is the token's share of the teacher's log-prob of its chunk; the shares are those of the student's own:

        log p̂_i = L_T · log q_i / L_S        A_i = (L_T / L_S − 1) · log q_i

    Over a chunk log p̂ adds up to L_T, and −A to the student's log-prob of the text less the teacher's. A chunk of one
    token has A = log p − log q. Reads facts.student and teacher.

    >>> ids = torch.tensor([0, 1, 0])
    >>> facts = Facts(token_ids=ids, lengths=(3,), positions=torch.arange(3), origin=torch.zeros_like(ids),
    ...               chunks=torch.tensor([0, 0, 1]), student=torch.tensor([-0.5, -1.5, -1.0]),
    ...               teacher=torch.tensor([-4.0, -4.0, -0.5]))
    >>> credit(facts).tolist()
    [-0.5, -1.5, 0.5]
    """
    own, teacher = known(facts.student, "student").double(), known(facts.teacher, "teacher").double()
    whole = _over_chunks(own, facts)
    share = torch.where(whole.abs() < SURE, 1 / _sizes(facts), own / whole)
    return share * teacher - own


def likelihood(facts: Facts, *, temperature: float) -> Linearised:
    """−P log Q − (1 − P) log(1 − Q) of every chunk, P = e^(L_T/τ) and Q = e^(L_S/τ) (ALM, arXiv 2503.20083, eq. 4).

    Each token of a chunk carries the same part of it, times the completion's tokens per chunk. So "sequence_mean" is
    the mean over completions of each one's mean over chunks, and "token_mean" the same weighted by their tokens; the
    paper's mean over all chunks weighs by their number. Smallest where L_S = L_T, but not 0.

    Where Q is 1 to within FLOOR its slope is that at FLOOR; the gradient of a plain clamp is 0, and a chunk of which
    the student is sure could not be unlearnt. Reads facts.student and teacher.
    """
    log_q = (_over_chunks(known(facts.student, "student").double(), facts) / temperature).clamp(max=-FLOOR)
    log_p = (known(facts.teacher, "teacher").double() / temperature).clamp(max=-FLOOR)
    p, sizes = log_p.exp(), _sizes(facts)
    value = -p * log_q - (1 - p) * log1mexp(log_q)
    slope = (log_q.exp() - p) / -log_q.expm1() / temperature
    tokens = torch.tensor(facts.lengths, device=p.device)
    tokens_per_chunk = (tokens / sequence_sums(1 / sizes, facts))[facts.sequence]
    return Linearised(value=value * tokens_per_chunk / sizes, slope=slope * tokens_per_chunk)


def _sizes(facts: Facts) -> Tensor:
    """[N] tokens of each token's chunk."""
    return _over_chunks(torch.ones(facts.token_ids.shape, dtype=torch.float64, device=facts.token_ids.device), facts)


def _over_chunks(values: Tensor, facts: Facts) -> Tensor:
    """[N] → [N] the sum over each token's chunk."""
    if facts.chunks is None:
        return values
    sums = torch.zeros(int(facts.chunks.max()) + 1, dtype=values.dtype, device=values.device)
    return sums.index_add(0, facts.chunks, values)[facts.chunks]
