"""Do these scores belong to these tokens? The last gate before numbers from a network may steer a gradient.

A violation raises AlignmentError: nothing is repaired, truncated or filled in. The one thing changed is that an item
whose status is not OK loses whatever numbers came with it: all of them become NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import AlignmentError
from potstill.types import FloatArray, IntArray, ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import ScoreItem, ScoreRequest, ScoreResponse, unscored

MAX_LOGPROB = 1e-4  # rounding may lift a probability of 1 this far
MASS_TOLERANCE = 1e-3
SAME_TOKEN_TOLERANCE = 1e-3  # nats between two columns that speak of the same token
_HALF_EXPONENT = 0x7F80  # all of these bits: infinite or NaN
_ASKED = (
    *("sampled", "topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail", "entropy"),
    *("drawn_ids", "drawn_logprobs", "hidden"),
)


def aligned(request: ScoreRequest, response: ScoreResponse, expect: TeacherIdentity | None) -> list[TeacherScores]:
    """The scores of `response`, in the order of the request's items, after every check. Raises AlignmentError."""
    asked = tuple(item.id for item in request.items)
    if response.ids != asked:
        raise AlignmentError(f"the teacher answered for other items, or in another order, than the {len(asked)} asked")
    if expect is not None and response.identity != expect:
        raise AlignmentError(
            f"{response.identity.name} {response.identity.revision} answered, not the teacher expected"
        )
    return [_item(request, item, scores) for item, scores in zip(request.items, response.scores, strict=True)]


def _item(request: ScoreRequest, item: ScoreItem, scores: TeacherScores) -> TeacherScores:
    blank = unscored(scores.identity, scores.status, num_tokens=len(item.completion_ids), ask=request.ask)
    if scores.status != ScoreStatus.OK:
        return blank
    for name in _ASKED:
        _check_shape(item.id, name, getattr(scores, name), getattr(blank, name))
    _check_logprobs(item.id, "sampled", scores.sampled)
    if scores.entropy is not None and not (
        np.isfinite(scores.entropy).all() and (scores.entropy >= -MAX_LOGPROB).all()
    ):
        raise AlignmentError(f"item {item.id}: entropy is negative or not finite")
    if scores.topk_ids is not None and scores.topk_logprobs is not None and scores.topk_tail is not None:
        _check_topk_ids(item.id, scores.topk_ids, scores.topk_logprobs)
        _check_outcomes(item, "topk", scores.topk_ids, scores.topk_logprobs, scores.topk_tail, scores.sampled)
    if item.token_ids is not None and scores.ids_logprobs is not None and scores.ids_tail is not None:
        _check_outcomes(item, "ids", item.token_ids, scores.ids_logprobs, scores.ids_tail, scores.sampled)
    if scores.drawn_ids is not None and scores.drawn_logprobs is not None:
        _check_drawn(item.id, scores.drawn_ids, scores.drawn_logprobs, scores.topk_ids)
    if scores.hidden is not None and ((scores.hidden & _HALF_EXPONENT) == _HALF_EXPONENT).any():
        raise AlignmentError(f"item {item.id}: hidden is not finite though the item's status is OK")
    return scores


def _check_shape(item_id: str, name: str, value: NDArray[Any] | None, wanted: NDArray[Any] | None) -> None:
    if (value is None) != (wanted is None):
        raise AlignmentError(f"item {item_id}: {name} is {'missing' if value is None else 'there without being asked'}")
    if value is not None and wanted is not None and (value.shape != wanted.shape or value.dtype != wanted.dtype):
        raise AlignmentError(f"item {item_id}: {name} is {value.dtype}{value.shape}, not {wanted.dtype}{wanted.shape}")


def _check_logprobs(item_id: str, name: str, values: FloatArray) -> None:
    if not np.isfinite(values).all():
        raise AlignmentError(f"item {item_id}: {name} is not finite though the item's status is OK")
    if (values > MAX_LOGPROB).any():
        raise AlignmentError(f"item {item_id}: {name} holds {values.max():.4g}, which is no log-probability")


def _check_topk_ids(item_id: str, ids: IntArray, logprobs: FloatArray) -> None:
    ordered = np.sort(ids, axis=1)
    if (ids < 0).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise AlignmentError(f"item {item_id}: topk_ids holds a negative or repeated id")
    if (np.diff(logprobs, axis=1) > 0).any():
        raise AlignmentError(f"item {item_id}: topk_logprobs is not sorted, most probable first")


def _check_drawn(item_id: str, ids: IntArray, logprobs: FloatArray, top: IntArray | None) -> None:
    """Draws are of tokens outside the top-k, each with one log-prob."""
    _check_logprobs(item_id, "drawn_logprobs", logprobs)
    if (ids < 0).any():
        raise AlignmentError(f"item {item_id}: drawn_ids holds a negative id")
    if top is not None and (ids[:, :, None] == top[:, None, :]).any():
        raise AlignmentError(f"item {item_id}: drawn_ids holds an id of the top-k")


def _check_outcomes(
    item: ScoreItem, name: str, ids: IntArray, logprobs: FloatArray, tail: FloatArray, sampled: FloatArray
) -> None:
    """Entries and tail must make one distribution, which says of the completion's token what `sampled` says."""
    _check_logprobs(item.id, f"{name}_logprobs", logprobs)
    if np.isnan(tail).any() or (tail > MAX_LOGPROB).any():
        raise AlignmentError(f"item {item.id}: {name}_tail is NaN or no log-probability")
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1) + np.exp(tail.astype(np.float64))
    if (np.abs(mass - 1.0) > MASS_TOLERANCE).any():
        raise AlignmentError(
            f"item {item.id}: {name} and its tail hold {mass[np.abs(mass - 1).argmax()]:.4f} of the mass"
        )
    same = ids == item.completion_ids[:, None]
    gap = np.abs(np.where(same, logprobs - sampled[:, None], 0.0)).max()
    if gap > SAME_TOKEN_TOLERANCE:
        raise AlignmentError(f"item {item.id}: {name}_logprobs and sampled differ by {gap:.4g} on the same token")
