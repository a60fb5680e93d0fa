"""Which outcomes a term looks at, and both sides' log-probs over them.

Where the teacher is inside the learner its logits are at hand, and ids are chosen here, under the current student.
Where it answers over HTTP the ids were chosen when the text was sampled, and the facts hold its log-probs of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner import supports, tempering
from learner.chunk import Chunk
from learner.facts import Moment
from potstill.algebra.objective import Term
from potstill.algebra.supports import (
    Full,
    IntersectionTopK,
    Nucleus,
    RandomSampling,
    StudentTopK,
    Support,
    TeacherTopK,
    TopK,
    UnionTopK,
)

Both = tuple[Tensor, Tensor]


def compare(term: Term, name: str, chunk: Chunk, moment: Moment) -> Both:
    """(log q, log p) of shape [C, O]; an outcome that is not in a row's support is −inf on both sides.

    `name` is the term's, under which `moment` holds its schedule. Raises ValueError when what the support reads is
    missing from the facts.
    """
    if name not in chunk.compared:
        chunk.compared[name] = _compared(term, name, chunk, moment)
    return chunk.compared[name]


def whole(term: Term, name: str, chunk: Chunk, moment: Moment) -> Both | None:
    """As `compare`, but with all mass of both sides at temperature 1, whatever the loss sees of it.

    The last outcome of a top-k is then the rest. None where that would cost a pass over the vocabulary of its own.
    """
    if term.sees_all_mass:
        return compare(term, name, chunk, moment)
    if not isinstance(term.support, TopK):
        return None
    ids, kept, rest, absent = _top_k(term, chunk)
    own, kept = (side.masked_fill(absent, -torch.inf) for side in (chunk.logq.gather(-1, ids), kept))
    return _with_rest(own, kept, rest)


def _compared(term: Term, name: str, chunk: Chunk, moment: Moment) -> Both:
    support = term.support
    if isinstance(support, Full):
        if term.target is None:
            return chunk.logq, chunk.other_logits(term.against).log_softmax(-1)
        both = tempering.apply(term.target, name, chunk, chunk.other_logits(term.against), moment)
        return both[0].log_softmax(-1), both[1].log_softmax(-1)
    if isinstance(support, Nucleus | RandomSampling):
        return _drawn(support, chunk, chunk.other_logits(term.against).log_softmax(-1))
    ids, kept, rest, absent = _top_k(term, chunk)  # refuses what is no top-k
    assert isinstance(support, TopK)
    kept = kept.masked_fill(absent, -torch.inf)
    if support.rest == "renorm":
        logits = chunk.logits.gather(-1, ids).masked_fill(absent, -torch.inf)
        if term.target is not None:
            logits, kept = tempering.apply_over(term.target, logits, kept)
        return _scaled(logits), _scaled(kept)
    own = chunk.logq.gather(-1, ids).masked_fill(absent, -torch.inf)
    if support.rest == "partial":
        return own, kept
    return _with_rest(own, kept, rest)


def _with_rest(own: Tensor, kept: Tensor, rest: Tensor) -> Both:
    return supports.with_bucket(own, supports.log_rest(own)), supports.with_bucket(kept, rest)


def _scaled(logits: Tensor) -> Tensor:
    """log_softmax; a row without any outcome stays one, which no loss adds to."""
    return logits - logits.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)


def _drawn(support: Nucleus | RandomSampling, chunk: Chunk, logp: Tensor) -> Both:
    if isinstance(support, Nucleus):
        outside = ~supports.nucleus(logp, support.mass)
        return (
            chunk.logits.masked_fill(outside, -torch.inf).log_softmax(-1),
            logp.masked_fill(outside, -torch.inf).log_softmax(-1),
        )
    ids, weights = supports.random_sampling(logp, chunk.fact("uniforms"), draws=support.draws, head=support.head)
    return chunk.logq.gather(-1, ids).masked_fill(weights == -torch.inf, -torch.inf), weights


def _top_k(term: Term, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [C, K], the other side's log-probs of them [C, K] and of all else [C], and which ids do not count [C, K].

    A teacher's −inf for an id that counts stays: a reverse KL there is infinite, and says so.
    """
    if not chunk.has_logits(term.against):
        names = {
            StudentTopK: ("support_ids", "teacher_support", "teacher_rest"),
            TeacherTopK: ("topk_ids", "teacher_topk", "topk_rest"),
        }.get(type(term.support))
        if names is not None:
            ids, kept, rest = (chunk.fact(name) for name in names)
            return ids.clamp(min=0), kept, rest, ids < 0  # -1: an entry that has no id of the student's
    logp = chunk.other_logits(term.against).log_softmax(-1)
    ids, absent = _ids(term.support, chunk.logq.detach(), logp)
    kept = logp.gather(-1, ids)
    if isinstance(term.support, IntersectionTopK):  # ids that do not count are part of the rest
        return ids, kept, supports.log_rest(kept.masked_fill(absent, -torch.inf)), absent
    return ids, kept, supports.log_outside(logp, ids), absent


def _ids(support: Support, logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [C, K'] and which of them do not count: they are there to fill up the row."""
    match support:
        case StudentTopK(k=k):
            ids = logq.topk(k, dim=-1).indices
            return ids, torch.zeros_like(ids, dtype=torch.bool)
        case TeacherTopK(k=k):
            ids = logp.topk(k, dim=-1).indices
            return ids, torch.zeros_like(ids, dtype=torch.bool)
        case UnionTopK(k=k):
            return supports.union(logq.topk(k, dim=-1).indices, logp.topk(k, dim=-1).indices)
        case IntersectionTopK(k=k):
            return supports.intersection(logq.topk(k, dim=-1).indices, logp.topk(k, dim=-1).indices)
    raise ValueError(f"support {support.kind!r} is not a top-k")


def teacher_order(term: Term, chunk: Chunk, logp: Tensor, *, gold_first: bool) -> Tensor:
    """[C, O] outcomes as the teacher ranks them, for a ranking loss; a bucket for the rest comes last.

    gold_first puts the written token at the head of its row. Raises ValueError where it is not in the support.
    """
    ranked = logp
    if isinstance(term.support, TopK) and term.support.rest == "tail":
        ranked = torch.cat([logp[:, :-1], torch.full_like(logp[:, -1:], -torch.inf)], dim=-1)
    if gold_first:
        ranked = ranked.masked_fill(_is_written(term, chunk, logp), torch.inf)
    return ranked.argsort(dim=-1, descending=True, stable=True)


def _is_written(term: Term, chunk: Chunk, logp: Tensor) -> Tensor:
    """[C, O] which outcome is the written token."""
    written = chunk.fact("token_ids").unsqueeze(-1)
    if isinstance(term.support, Full):
        return torch.arange(logp.shape[-1], device=logp.device) == written
    ids, _, _, absent = _top_k(term, chunk)
    found = (ids == written) & ~absent
    if not bool(found.any(-1).all()):
        raise ValueError("loss.gold_first: a written token is outside the support; use a larger k, or support = full")
    return torch.nn.functional.pad(found, (0, logp.shape[-1] - ids.shape[-1]))
