"""From scored rollouts to the facts of a micro-batch. Where masks, missing scores and alignment are settled.

Refuses scores that are not for the tokens at hand: ids, lengths and finiteness are checked here, before any gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from potstill.algebra.supports import RandomSampling, Samples, StudentTopK, TeacherTopK
from potstill.byte_alignment import whole_chunks
from potstill.errors import AlignmentError
from potstill.types import BoolArray, FloatArray, IntArray, Rollout, ScoredRollout, ScoreStatus, TeacherScores

SCORES = (
    *("sampled", "draws", "topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail", "entropy", "chunks"),
    "hidden",
)


def check_ids(scored: ScoredRollout, *, vocabulary: int) -> None:
    """Every id that is looked up later is in [0, vocabulary). Raises AlignmentError naming rollout and field.

    vocabulary  rows of the student's head
    """
    rollout, scores = scored.rollout, scored.scores
    fields = {name: getattr(rollout, name) for name in ("prompt_ids", "completion_ids", "support_ids")}
    fields |= {"teacher_context_ids": rollout.teacher_context_ids, "draw_ids": rollout.draw_ids}
    if scores is not None and scores.status == ScoreStatus.OK and scores.topk_ids is not None:
        own = scores.topk_ids
        fields["scores.topk_ids"] = own if scores.chunks is None else own[own != -1]  # -1: no such id of the student's
    for name, ids in fields.items():
        if ids is not None and ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
            raise AlignmentError(f"rollout {rollout.id}: {name} holds an id outside the vocabulary of {vocabulary}")


def fresh(batch: Sequence[ScoredRollout], oldest_version: int) -> list[ScoredRollout]:
    """The same rollouts; tokens that a version before `oldest_version` wrote are read and not trained on."""
    return [_without_stale(scored, oldest_version) for scored in batch]


def _without_stale(scored: ScoredRollout, oldest_version: int) -> ScoredRollout:
    """A snapshot's text is never stale: the weights that wrote it do not move."""
    rollout = scored.rollout
    stale = (rollout.weight_versions >= 0) & (rollout.weight_versions < oldest_version)
    if rollout.snapshot or not stale.any():
        return scored
    return replace(scored, rollout=replace(rollout, loss_mask=rollout.loss_mask & ~stale))


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
        mask = mask if scores.chunks is None else whole_chunks(scores.chunks, mask)
    return mask


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

    inside   every logit of the teacher is at hand: nothing else that it says is read
    rewards  by name of a field of Facts, one number a rollout: what rewards.py made of the whole step
    """
    rollouts = [scored.rollout for scored in batch]
    lengths = [int(mask.sum()) for mask in masks]
    fields: dict[str, Any] = {name: _spread(values, lengths, device) for name, values in rewards.items()}
    fields["behaviour"] = _gather([r.student_logprobs for r in rollouts], masks, device)
    fields["age"] = _gather([_age(r, step) for r in rollouts], masks, device).long()
    if _read_draws(rollouts, objective):
        fields["sample_ids"] = _gather(_own(rollouts, "draw_ids"), masks, device).long()
        fields["sample_behaviour"] = _gather(_own(rollouts, "draw_logprobs"), masks, device)
    if not inside and any(objective.scored(rollout.origin) for rollout in rollouts):
        fields |= _scores(batch, masks, objective, device)
    if objective.reads_privacy:
        fields["privacy"] = _gather([_privacy(rollout) for rollout in rollouts], masks, device)
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
    if _read_draws([scored.rollout for scored in batch], objective):
        fields["sample_teacher"] = "draws"
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
        found["support_ids"] = _gather(_own([s.rollout for s in batch], "support_ids"), masks, device).long()
    if "topk_ids" in found:
        found["topk_ids"] = found["topk_ids"].long()
    if any(scored.scores is not None and scored.scores.chunks is not None for scored in batch):
        found["chunks"] = _chunks(batch, masks, objective, device)
    return found


def _read_draws(rollouts: Sequence[Rollout], objective: Objective) -> bool:
    """Whether a term is of draws that were made beside one of these texts."""
    origins = {"all", *(rollout.origin for rollout in rollouts)}
    return any(isinstance(term.support, Samples) and term.over in origins for term in objective.terms.values())


def _chunks(
    batch: Sequence[ScoredRollout], masks: Sequence[BoolArray], objective: Objective, device: torch.device
) -> Tensor:
    """[N] chunks, numbered over the batch; a token of a completion that has none is one."""
    if not objective.crosses_tokenizers:
        raise AlignmentError(
            "the teacher has another tokenizer and scored several tokens at once, which the objective does not read; "
            'use a loss "chunk_credit" or "chunk_likelihood"'
        )
    found: list[NDArray[np.int64]] = []
    num_chunks = 0
    for scored, mask in zip(batch, masks, strict=True):
        own = np.arange(len(mask)) if scored.scores is None or scored.scores.chunks is None else scored.scores.chunks
        names, numbers = np.unique(own[mask], return_inverse=True)
        found.append(numbers + num_chunks)
        num_chunks += len(names)
    return torch.from_numpy(np.concatenate(found)).to(device)


def _check_widths(scored: ScoredRollout, objective: Objective) -> None:
    """A position has the entries that a top-k asks for, for a confidence one at least; ids and log-probs alike."""
    rollout, scores = scored.rollout, scored.scores
    if scores is None:
        return
    students = [values.shape[1:] for values in (rollout.support_ids, scores.ids_logprobs) if values is not None]
    teachers = [values.shape[1:] for values in (scores.topk_ids, scores.topk_logprobs) if values is not None]
    for term in objective.scored(rollout.origin):
        support = term.support
        if isinstance(support, StudentTopK | TeacherTopK):
            for width in students if isinstance(support, StudentTopK) else teachers:
                if width != (support.k,):
                    raise AlignmentError(
                        f"rollout {rollout.id} has {width} entries a position, objective.support.k is {support.k}"
                    )
        if any(isinstance(gate, Confidence) for gate in term.gates) and not {(), (0,)}.isdisjoint(teachers):
            raise AlignmentError(f'rollout {rollout.id} has no entry of the teacher\'s top-k for gate "confidence"')


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


def _own(rollouts: Sequence[Rollout], name: str) -> list[NDArray[Any]]:
    """What the student kept when it wrote; 0 for text that it did not write, which no term reads."""
    known = [getattr(rollout, name) for rollout in rollouts]
    like = next((value for value in known if value is not None), None)
    if like is None:
        raise AlignmentError(f"no rollout carries {name}: they were not kept when the student wrote")
    return [
        np.zeros((len(rollout.completion_ids), like.shape[1]), like.dtype) if value is None else value
        for rollout, value in zip(rollouts, known, strict=True)
    ]


def _age(rollout: Rollout, step: int) -> IntArray:
    """[T] versions that each token trails the student which step `step` moves; -1 where no version of it wrote."""
    written = (rollout.weight_versions >= 0) & (not rollout.snapshot)
    return np.where(written, step - 1 - rollout.weight_versions, -1).astype(np.int32)


def _privacy(rollout: Rollout) -> FloatArray:
    """[T]; nothing is taken to be public because nobody looked."""
    if rollout.privacy is None:
        raise AlignmentError(f"rollout {rollout.id} does not say how private its tokens are, which the objective reads")
    return rollout.privacy


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
