"""Three questions asked of the first real batch, before the first step moves anything (DESIGN §10).

  sampler     does the learner agree with the sampler on the log-probs of the tokens that were sampled?
  mirror      are loss and gradient about zero when the student's own distribution stands in for the teacher's?
  scramble    does the gradient change when the teacher's scores are handed to the wrong tokens?

A pipeline that collects a teacher's scores and never uses them, uses them one token off, or trains on the output of
another template passes every shape check. It does not pass these. For methods with a teacher behind HTTP, whether it
sends log-probs or states; a teacher inside the learner has nothing to misalign.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.logprobs import id_logprobs, upcast
from learner.packing import pack
from learner.sent_states import SentStates, as_bits
from learner.supports import log_rest
from learner.targets import aligned
from learner.trainer import Trainer, totals
from potstill.errors import RunError, SignalLost
from potstill.types import FloatArray, IntArray, ScoredRollout, ScoreStatus

SAMPLER_TOLERANCE = 0.02  # nats, mean over tokens: float32 engines differ by 1e-5, bfloat16 ones by 1e-2
MIRROR_TOLERANCE = 1e-3  # nats per token
PUSH_TOLERANCE = 0.1  # of the scrambled gradient; a sampled loss may cancel to 0 where its gradient does not
SCRAMBLE_TOLERANCE = 1e-6  # of the gradient's norm: what a GPU's unordered sums may change


def check(trainer: Trainer, batch: Sequence[ScoredRollout]) -> dict[str, float]:
    """Run the canaries on the rollouts of `batch` that were scored (a few are enough).

    Raises RunError naming the canary that died, SignalLost when the teacher scored none.
    """
    batch = [scored for scored in batch if aligned(scored).status == ScoreStatus.OK]
    if not batch:
        raise SignalLost("canary: the teacher scored none of the first rollouts")
    mirrored = [_mirror(trainer, scored) for scored in batch]
    gap = _check_sampler(trainer, batch, mirrored)
    with _own_head(trainer):
        own, gradient = _loss_and_gradient(trainer, mirrored)
    norm = trainer.student.ranks.norm
    own_norm = norm(gradient)
    if not abs(own) <= MIRROR_TOLERANCE:
        raise RunError(f"canary: the loss of the student against itself is {own:.3g} nats per token instead of 0")
    _, gradient = _loss_and_gradient(trainer, batch)
    _, scrambled = _loss_and_gradient(trainer, _scrambled(batch))
    change = (norm([a - b for a, b in zip(gradient, scrambled, strict=True)]) / norm(gradient)).item()
    if not change > SCRAMBLE_TOLERANCE:
        raise RunError("canary: the gradient is the same with the teacher's scores scrambled: they are not being used")
    push = (own_norm / norm(scrambled)).item()
    if not push <= PUSH_TOLERANCE:
        raise RunError(
            f"canary: the gradient of the student against itself is {push:.3g} of that of scrambled scores "
            "instead of 0: scores reach the wrong tokens"
        )
    return {"sampler_gap": gap, "mirror_loss": own, "mirror_push": push, "scramble_change": change}


def _mirror(trainer: Trainer, scored: ScoredRollout) -> ScoredRollout:
    """The same rollout as the student itself would score it, in every field that the teacher filled."""
    rollout, scores = scored.rollout, aligned(scored)
    everywhere = np.ones_like(rollout.loss_mask)
    with torch.no_grad():
        hidden = trainer.student(pack([rollout.prompt_ids], [rollout.completion_ids], [everywhere]))
    changes: dict[str, Any] = {"sampled": _logprobs(trainer, hidden, rollout.completion_ids[:, None])[:, 0].numpy()}
    changes["chunks"] = None  # the student scores its own tokens
    if scores.topk_ids is not None:
        ids = np.array([_filled(row) for row in scores.topk_ids.tolist()], dtype=np.int32)
        kept = _logprobs(trainer, hidden, ids)
        changes |= {"topk_ids": ids, "topk_logprobs": kept.numpy(), "topk_tail": log_rest(kept).numpy()}
    if rollout.support_ids is not None:
        kept = _logprobs(trainer, hidden, rollout.support_ids)
        changes |= {"ids_logprobs": kept.numpy(), "ids_tail": log_rest(kept).numpy()}
    if rollout.draw_ids is not None:
        changes["draws"] = _logprobs(trainer, hidden, rollout.draw_ids).numpy()
    if scores.hidden is not None:
        changes["hidden"] = as_bits(hidden)
    return ScoredRollout(rollout=rollout, scores=dataclasses.replace(scores, **changes))


@contextlib.contextmanager
def _own_head(trainer: Trainer) -> Iterator[None]:
    """Meanwhile states that were sent are multiplied with the student's head: those of a mirror are the student's."""
    teacher = trainer.teacher
    if isinstance(teacher, SentStates):
        trainer.teacher = SentStates(trainer.student.head.clone())  # whole since the mirror's pass, if over ranks
    try:
        yield
    finally:
        trainer.teacher = teacher


def _filled(row: Sequence[int]) -> list[int]:
    """The ids, with others in place of those that a teacher of another tokenizer could not name (-1)."""
    others = (token for token in range(2 * len(row)) if token not in row)
    return [next(others) if token < 0 else token for token in row]


def _logprobs(trainer: Trainer, hidden: Tensor, ids: IntArray) -> Tensor:
    """[T, K] log-probs of `ids`, a chunk of rows at a time."""
    columns = torch.from_numpy(ids).long().to(hidden.device)
    found = id_logprobs(
        lambda rows: upcast(hidden[rows] @ trainer.student.head.T),
        columns,
        chunk_tokens=trainer.config.learner.chunk_tokens,
    )
    return found.detach().cpu()


def _check_sampler(trainer: Trainer, batch: Sequence[ScoredRollout], mirrored: Sequence[ScoredRollout]) -> float:
    """Nats per token; NaN where the sampler's log-probs are not the student's but tempered or truncated."""
    rollout = trainer.config.rollout
    sampling = rollout.sampling
    if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
        return math.nan
    mean = np.nanmean if rollout.source == "revision" else np.mean  # its texts have a token each that nobody sampled
    gap = float(mean(_sampler_gaps(batch, mirrored)))
    if not gap <= SAMPLER_TOLERANCE:  # a NaN dies too
        raise RunError(
            f"canary: sampler and learner disagree by {gap:.3g} nats per token on the student's own tokens; "
            "do engine and learner hold the same weights, dtype and prompt?"
        )
    return gap


def _sampler_gaps(batch: Sequence[ScoredRollout], mirrored: Sequence[ScoredRollout]) -> FloatArray:
    gaps = [
        np.abs(scored.rollout.student_logprobs - aligned(own).sampled)[scored.rollout.loss_mask]
        for scored, own in zip(batch, mirrored, strict=True)
    ]
    return np.concatenate(gaps)


def _scrambled(batch: Sequence[ScoredRollout]) -> list[ScoredRollout]:
    """Every score handed to the token after the one it belongs to, across rollouts: one-token answers scramble too."""
    scores = [aligned(scored) for scored in batch]
    ends = np.cumsum([len(s.sampled) for s in scores])[:-1]
    changes: list[dict[str, Any]] = [{} for _ in batch]
    columns = ("sampled", "draws", "topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail")
    for name in (*columns, "entropy", "hidden"):
        if getattr(scores[0], name) is None:
            continue
        shifted = np.roll(np.concatenate([getattr(s, name) for s in scores]), 1, axis=0)
        for change, part in zip(changes, np.split(shifted, ends), strict=True):
            change[name] = part
    return [
        ScoredRollout(rollout=scored.rollout, scores=dataclasses.replace(own, **change))
        for scored, own, change in zip(batch, scores, changes, strict=True)
    ]


def _loss_and_gradient(trainer: Trainer, batch: Sequence[ScoredRollout]) -> tuple[float, list[Tensor]]:
    masks = trainer.masks(batch)
    tally = trainer.accumulate(batch, masks, totals(batch, masks), step=1)
    gradient = trainer.masters.gradients()
    trainer.optimizer.zero_grad(set_to_none=True)
    return sum(loss.item() for loss in tally.losses.values()), gradient
