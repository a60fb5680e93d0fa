"""From scored rollouts to the tensors that the loss reads. Where masks, missing scores and denominators are settled.

Refuses scores that are not for the tokens at hand: ids, lengths and finiteness are checked here, before any gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from learner.objective import Targets
from potstill.errors import AlignmentError
from potstill.methods import Objective
from potstill.types import BoolArray, IntArray, Rollout, ScoredRollout, ScoreStatus, TeacherScores


def trainable(scored: ScoredRollout, objective: Objective) -> BoolArray:
    """[T] loss tokens that carry everything the objective reads. The others are masked, and counted by the caller."""
    rollout = scored.rollout
    if objective.divergence == "nll":
        return rollout.loss_mask
    mask = rollout.loss_mask & (rollout.weight_versions >= 0)
    if objective.support == "full":
        return mask
    scores = aligned(scored)
    if scores.status != ScoreStatus.OK:
        return np.zeros_like(mask)
    finite: BoolArray = np.isfinite(scores.sampled)
    if objective.support == "sampled":
        finite &= np.isfinite(rollout.student_logprobs)
    finite &= mask
    return finite


def aligned(scored: ScoredRollout) -> TeacherScores:
    """The rollout's scores, once their shape fits its tokens. Raises AlignmentError otherwise."""
    rollout, scores = scored.rollout, scored.scores
    if scores is None:
        raise AlignmentError(f"rollout {rollout.id} carries no teacher's scores")
    for name in ("sampled", "topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail"):
        value = getattr(scores, name)
        if value is not None and len(value) != len(rollout.completion_ids):
            raise AlignmentError(
                f"rollout {rollout.id}: scores.{name} has {len(value)} rows for {len(rollout.completion_ids)} tokens"
            )
    return scores


def teacher_context(rollout: Rollout) -> IntArray:
    """What a teacher inside the learner reads before the completion. Raises AlignmentError when it was not rendered."""
    if rollout.teacher_context_ids is None:
        raise AlignmentError(f"rollout {rollout.id} has no teacher_context_ids for the self-teacher to read")
    return rollout.teacher_context_ids


def targets(
    batch: Sequence[ScoredRollout],
    masks: Sequence[BoolArray],
    objective: Objective,
    device: torch.device,
    teacher_logits: Callable[[slice], Tensor] | None,
) -> Targets:
    """Targets of the batch's loss tokens, in packed order."""
    rollouts = [scored.rollout for scored in batch]
    token_ids = _gather([r.completion_ids for r in rollouts], masks, device).long()
    if objective.divergence == "nll":
        return Targets(token_ids=token_ids)
    if objective.support == "full":
        return Targets(token_ids=token_ids, teacher_logits=teacher_logits)
    scores = [aligned(scored) for scored in batch]
    if objective.support == "sampled":
        return Targets(
            token_ids=token_ids,
            behaviour=_gather([r.student_logprobs for r in rollouts], masks, device),
            teacher=_gather([s.sampled for s in scores], masks, device),
        )
    supports = [_support(r, s, objective) for r, s in zip(rollouts, scores, strict=True)]
    ids, logprobs, rest = zip(*supports, strict=True)
    return Targets(
        token_ids=token_ids,
        support_ids=_gather(ids, masks, device).long(),
        teacher_support=_gather(logprobs, masks, device),
        teacher_rest=_gather(rest, masks, device),
    )


def _support(
    rollout: Rollout, scores: TeacherScores, objective: Objective
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if objective.support == "student_topk":
        fields = (rollout.support_ids, scores.ids_logprobs, scores.ids_tail)
    else:
        fields = (scores.topk_ids, scores.topk_logprobs, scores.topk_tail)
    ids, logprobs, rest = fields
    if ids is None or logprobs is None or rest is None:
        raise AlignmentError(f"rollout {rollout.id} was not scored over the {objective.support} that the method reads")
    if ids.shape != logprobs.shape:
        raise AlignmentError(f"rollout {rollout.id}: {ids.shape} ids but {logprobs.shape} log-probs")
    return ids, logprobs, rest


def _gather(values: Sequence[np.ndarray], masks: Sequence[BoolArray], device: torch.device) -> Tensor:
    kept = [value[mask] for value, mask in zip(values, masks, strict=True)]
    return torch.from_numpy(np.concatenate(kept)).to(device)
