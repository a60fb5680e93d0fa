"""From scored rollouts to the facts of a micro-batch. Where masks, missing scores and alignment are settled.

Refuses scores that are not for the tokens at hand: ids, lengths and finiteness are checked here, before any gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.aggregation import budget_keep
from learner.facts import ORIGINS, Facts
from potstill.algebra.aggregations import TokenBudget
from potstill.algebra.gates import Confidence
from potstill.algebra.objective import Objective
from potstill.algebra.supports import RandomSampling, StudentTopK, TeacherTopK
from potstill.errors import AlignmentError
from potstill.types import BoolArray, IntArray, Rollout, ScoredRollout, ScoreStatus, TeacherScores

SCORES = ("sampled", "topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail", "entropy")


def check_ids(scored: ScoredRollout, *, vocabulary: int) -> None:
    """Every id that is looked up later is in [0, vocabulary). Raises AlignmentError naming rollout and field.

    vocabulary  rows of the student's head
    """
    rollout, scores = scored.rollout, scored.scores
    fields = {name: getattr(rollout, name) for name in ("prompt_ids", "completion_ids", "support_ids")}
    fields |= {"teacher_context_ids": rollout.teacher_context_ids}
    fields |= {"scores.topk_ids": scores.topk_ids} if scores is not None and scores.status == ScoreStatus.OK else {}
    for name, ids in fields.items():
        if ids is not None and ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
            raise AlignmentError(f"rollout {rollout.id}: {name} holds an id outside the vocabulary of {vocabulary}")


def trainable(scored: ScoredRollout, objective: Objective, *, inside: bool) -> BoolArray:
    """[T] loss tokens that carry everything the objective reads. The others are masked, and counted by the caller.

    inside  the teacher is in the learner: nothing that it says of a token can be missing
    """
    rollout, own = scored.rollout, scored.rollout.origin
    mask: BoolArray = rollout.loss_mask.copy()
    if own != "others":
        mask &= rollout.weight_versions >= 0
    terms = [term for term in objective.terms.values() if term.over in {"all", own}]
    if not terms:
        return np.zeros_like(mask)
    if any(term.needs_sampler for term in terms):
        mask &= np.isfinite(rollout.student_logprobs)
    if not inside and objective.scored(own):
        scores = aligned(scored)
        mask &= np.isfinite(scores.sampled) if scores.status == ScoreStatus.OK else False
    return mask


def aligned(scored: ScoredRollout) -> TeacherScores:
    """The rollout's scores, once their shape fits its tokens. Raises AlignmentError otherwise."""
    rollout, scores = scored.rollout, scored.scores
    if scores is None:
        raise AlignmentError(f"rollout {rollout.id} carries no teacher's scores")
    for name in SCORES:
        value = getattr(scores, name)
        if value is not None and len(value) != len(rollout.completion_ids):
            raise AlignmentError(
                f"rollout {rollout.id}: scores.{name} has {len(value)} rows for {len(rollout.completion_ids)} tokens"
            )
    return scores


def teacher_context(rollout: Rollout, *, privileged: bool) -> IntArray:
    """What a teacher inside the learner reads before the completion.

    privileged  it has a prompt of its own. Raises AlignmentError where that was not rendered.
    """
    if not privileged:
        return rollout.prompt_ids
    if rollout.teacher_context_ids is None:
        raise AlignmentError(f"rollout {rollout.id} has no teacher_context_ids for the teacher to read")
    return rollout.teacher_context_ids


def gather(
    batch: Sequence[ScoredRollout],
    masks: Sequence[BoolArray],
    objective: Objective,
    *,
    device: torch.device,
    step: int,
    inside: bool,
    rewards: Mapping[str, Sequence[float]],
) -> Facts:
    """Facts of the batch's loss tokens, in packed order; what the models know (look.py, logits) comes later.

    rewards  by name of a field of Facts, one number a rollout: what rewards.py made of the whole step
    """
    rollouts = [scored.rollout for scored in batch]
    lengths = [int(mask.sum()) for mask in masks]
    fields: dict[str, Any] = {name: _spread(values, lengths, device) for name, values in rewards.items()}
    if any(term.needs_sampler for term in objective.terms.values()):
        fields["behaviour"] = _gather([r.student_logprobs for r in rollouts], masks, device)
    if not inside and objective.tier > 0:
        fields |= _scores(batch, masks, objective, device)
    if draws := _draws(objective):
        uniforms = [_uniforms(r, draws, step) for r in rollouts]
        fields["uniforms"] = _gather(uniforms, masks, device)
    origins = [ORIGINS[rollout.origin] for rollout in rollouts]
    return Facts(
        token_ids=_gather([r.completion_ids for r in rollouts], masks, device).long(),
        lengths=tuple(lengths),
        positions=torch.from_numpy(np.concatenate([np.flatnonzero(mask) for mask in masks])).to(device),
        origin=torch.tensor(origins, device=device).repeat_interleave(torch.tensor(lengths, device=device)),
        prompts=tuple(r.prompt_id for r in rollouts),
        domains=tuple(r.domain for r in rollouts),
        teachers=tuple("" if s.scores is None else s.scores.identity.name for s in batch),
        **fields,
    )


def _scores(
    batch: Sequence[ScoredRollout], masks: Sequence[BoolArray], objective: Objective, device: torch.device
) -> dict[str, Tensor]:
    """What a teacher behind HTTP said. A rollout that no term compares with it may have no scores: NaN, never read."""
    fields = {"teacher": "sampled"}
    terms = [term for term in objective.terms.values() if term.reads_scores]
    supports = [term.support for term in terms]
    sure = any(isinstance(gate, Confidence) for term in terms for gate in term.gates)
    if any(isinstance(support, StudentTopK) for support in supports):
        fields |= {"teacher_support": "ids_logprobs", "teacher_rest": "ids_tail"}
    if sure or any(isinstance(support, TeacherTopK) for support in supports):
        fields |= {"topk_ids": "topk_ids", "teacher_topk": "topk_logprobs", "topk_rest": "topk_tail"}
    if any(scored.scores is not None and scored.scores.entropy is not None for scored in batch):
        fields["teacher_entropy"] = "entropy"
    for scored in batch:
        _check_widths(scored, objective)
    found = {field: _gather(_column(batch, name), masks, device) for field, name in fields.items()}
    if "teacher_support" in found:
        found["support_ids"] = _gather(_own_support(batch), masks, device).long()
    if "topk_ids" in found:
        found["topk_ids"] = found["topk_ids"].long()
    return found


def _check_widths(scored: ScoredRollout, objective: Objective) -> None:
    """The entries of each position are those that the objective's top-k asks for, ids and log-probs alike."""
    if scored.scores is None:
        return
    read: dict[type, tuple[IntArray | None, Any]] = {
        StudentTopK: (scored.rollout.support_ids, scored.scores.ids_logprobs),
        TeacherTopK: (scored.scores.topk_ids, scored.scores.topk_logprobs),
    }
    for term in objective.scored(scored.rollout.origin):
        for values in read.get(type(term.support), ()):
            if values is not None and values.shape[1:] != (term.support.k,):  # type: ignore[union-attr]
                raise AlignmentError(
                    f"rollout {scored.rollout.id} has {values.shape[1:]} entries a position, "
                    f"objective.support.k is {term.support.k}"  # type: ignore[union-attr]
                )


def _column(batch: Sequence[ScoredRollout], name: str) -> list[NDArray[Any]]:
    """One field of every rollout's scores; NaN (ids: 0) for a rollout that was not scored, which no term reads."""
    known = [None if s.scores is None else getattr(aligned(s), name) for s in batch]
    like = next((value for value in known if value is not None), None)
    if like is None:
        raise AlignmentError(f"the teacher did not send {name}, which the method reads")
    missing = 0 if np.issubdtype(like.dtype, np.integer) else np.nan
    return [
        np.full((len(s.rollout.completion_ids), *like.shape[1:]), missing, like.dtype) if value is None else value
        for s, value in zip(batch, known, strict=True)
    ]


def _own_support(batch: Sequence[ScoredRollout]) -> list[IntArray]:
    """The ids that the student chose when it wrote; 0 for text that it did not write."""
    like = next((s.rollout.support_ids for s in batch if s.rollout.support_ids is not None), None)
    if like is None:
        raise AlignmentError("no rollout carries support_ids: the student's top-k was not kept when it wrote")
    return [
        np.zeros((len(s.rollout.completion_ids), like.shape[1]), like.dtype)
        if s.rollout.support_ids is None
        else s.rollout.support_ids
        for s in batch
    ]


def _draws(objective: Objective) -> int:
    """Random numbers that the objective wants at every token."""
    drawn = [t.support.draws for t in objective.terms.values() if isinstance(t.support, RandomSampling)]
    noisy = [2 for t in objective.terms.values() if getattr(t.target, "noise", 0) > 0]
    return max([*drawn, *noisy], default=0)


def _uniforms(rollout: Rollout, draws: int, step: int) -> NDArray[np.float64]:
    """[T, draws] of [0, 1): by completion and step alone, so that no split of the batch changes a number."""
    digest = hashlib.blake2b(f"{rollout.id}/{step}".encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(digest, "big"))
    return random.random((len(rollout.completion_ids), draws))


def _spread(values: Sequence[float], lengths: Sequence[int], device: torch.device) -> Tensor:
    """One number a rollout → one a loss token."""
    return torch.tensor(values, dtype=torch.float64, device=device).repeat_interleave(
        torch.tensor(lengths, device=device)
    )


def _gather(values: Sequence[NDArray[Any]], masks: Sequence[BoolArray], device: torch.device) -> Tensor:
    kept = [value[mask] for value, mask in zip(values, masks, strict=True)]
    return torch.from_numpy(np.concatenate(kept)).to(device)


def budgeted(
    batch: Sequence[ScoredRollout], masks: Sequence[BoolArray], objective: Objective, *, step: int
) -> list[BoolArray]:
    """The masks without what exceeds a token budget (C3PO); a budget is of the text that its term is over."""
    kept = list(masks)
    for term in objective.terms.values():
        if isinstance(term.aggregation, TokenBudget):
            read = [i for i, scored in enumerate(batch) if term.over in {"all", scored.rollout.origin}]
            lengths = [int(kept[i].sum()) for i in read]
            keep = budget_keep(lengths, tokens=term.aggregation.tokens, seed=step)
            for place, length in zip(read, keep, strict=True):
                kept[place] = kept[place] & (np.cumsum(kept[place]) <= length)
    return kept
