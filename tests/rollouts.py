"""Rollouts and teacher's scores by hand: a test names what it is about and leaves the rest.

Lists in, the types of potstill/types.py out. Log-probs keep float64, so that a test can compare to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from potstill.types import FinishReason, Rollout, ScoredRollout, ScoreStatus, TeacherIdentity, TeacherScores

IDENTITY = TeacherIdentity(name="teacher", revision="r1", tokenizer_fingerprint="f1")


def make_rollout(
    *,
    id: str = "a/0",
    prompt: Sequence[int] = (1, 2),
    completion: Sequence[int] = (3, 4, 5),
    mask: Sequence[bool] | None = None,
    student: Sequence[float] | None = None,
    versions: Sequence[int] | None = None,
    teacher_context: Sequence[int] | None = None,
    support_ids: Any = None,
    draw_ids: Any = None,
    draw_logprobs: Any = None,
    privacy: Sequence[float] | None = None,
) -> Rollout:
    """A completion that version 0 wrote and that is trained on everywhere, unless said otherwise."""
    length = len(completion)
    return Rollout(
        id=id,
        prompt_id=id.split("/")[0],
        index=0,
        domain="test",
        prompt_ids=_ids(prompt),
        completion_ids=_ids(completion),
        loss_mask=np.array([True] * length if mask is None else mask),
        student_logprobs=np.array([-1.0] * length if student is None else student),
        weight_versions=_ids([0] * length if versions is None else versions),
        finish_reason=FinishReason.LENGTH,
        temperature=1.0,
        reward=math.nan,
        teacher_context_ids=None if teacher_context is None else _ids(teacher_context),
        support_ids=None if support_ids is None else np.asarray(support_ids, dtype=np.int32),
        draw_ids=None if draw_ids is None else np.asarray(draw_ids, dtype=np.int32),
        draw_logprobs=draw_logprobs,
        privacy=None if privacy is None else np.asarray(privacy),
    )


def make_scores(*, sampled: Sequence[float], status: int = ScoreStatus.OK, **fields: Any) -> TeacherScores:
    """Scores with the fields that the test names, e.g. topk_logprobs=[[-0.1, -2.4]]."""
    arrays = {name: np.asarray(value) for name, value in fields.items()}
    return TeacherScores(status=status, identity=IDENTITY, sampled=np.asarray(sampled, dtype=np.float64), **arrays)


def make_scored(
    rollout: Rollout | None = None, *, sampled: Sequence[float] | None = None, **fields: Any
) -> ScoredRollout:
    """A rollout (the plain one by default) and its scores, −1 nat everywhere unless said otherwise."""
    rollout = make_rollout() if rollout is None else rollout
    sampled = [-1.0] * len(rollout.completion_ids) if sampled is None else sampled
    return ScoredRollout(rollout=rollout, scores=make_scores(sampled=sampled, **fields))


def random_batch(
    lengths: Sequence[tuple[int, int]],
    *,
    vocabulary: int,
    seed: int,
    k: int = 3,
    masks: Sequence[Any] | None = None,
    by: str = "student",
) -> list[ScoredRollout]:
    """Rollouts of (prompt, completion) lengths with every field filled: a random teacher, a random stale sampler.

    The teacher's numbers are of one distribution per token, so that its sampled, top-k and given-id scores agree.
    A privileged context, two tokens longer than the prompt, is there for self-teachers. by="others": nobody sampled it.
    """
    random = np.random.default_rng(seed)
    batch = []
    for number, (num_prompt, num_completion) in enumerate(lengths):
        completion = random.integers(0, vocabulary, num_completion)
        teacher = _log_softmax(random.normal(0, 2, (num_completion, vocabulary)))
        support = np.array([random.permutation(vocabulary)[:k] for _ in range(num_completion)])
        topk = np.argsort(-teacher, axis=1)[:, :k]
        sampler = _log_softmax(random.normal(0, 1, (num_completion, vocabulary)))
        draws = random.integers(0, vocabulary, (num_completion, k))
        rollout = make_rollout(
            id=f"p{number}/0",
            prompt=random.integers(0, vocabulary, num_prompt),
            completion=completion,
            mask=None if masks is None else masks[number],
            student=sampler[range(num_completion), completion],
            teacher_context=random.integers(0, vocabulary, num_prompt + 2),
            versions=[0 if by == "student" else -1] * num_completion,
            support_ids=support,
            draw_ids=draws,
            draw_logprobs=np.take_along_axis(sampler, draws, axis=1),
            privacy=completion % 2,
        )
        scores = scores_of(teacher, completion=completion, topk=topk, support=support, draws=draws)
        batch.append(ScoredRollout(rollout=rollout, scores=scores))
    return batch


def scores_of(teacher: Any, *, completion: Any, topk: Any, support: Any, draws: Any) -> TeacherScores:
    """Every field of TeacherScores from the teacher's whole distribution, [T, V] log-probs."""
    rows = np.arange(len(teacher))
    return make_scores(
        sampled=teacher[rows, completion],
        draws=np.take_along_axis(teacher, draws, axis=1),
        topk_ids=topk,
        topk_logprobs=np.take_along_axis(teacher, topk, axis=1),
        topk_tail=_log_outside(teacher, topk),
        ids_logprobs=np.take_along_axis(teacher, support, axis=1),
        ids_tail=_log_outside(teacher, support),
    )


def _log_outside(logprobs: Any, ids: Any) -> Any:
    outside = np.exp(logprobs)
    np.put_along_axis(outside, ids, 0.0, axis=1)
    return np.log(outside.sum(axis=1))


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _ids(values: Sequence[int]) -> Any:
    return np.asarray(values, dtype=np.int32)
