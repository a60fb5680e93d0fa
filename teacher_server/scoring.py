"""Hidden states to log-probs of the tokens asked for: pure torch, float32, temperature 1.

Legend: N rows (one per completion token), H hidden size, V rows of the head, K entries of a top-k.
Rows go through the head in chunks, so that no [N, V] tensor ever exists, only [chunk, V].
The softmax runs over all V rows of the head, which is the distribution the model really has. A top-k is taken among
the first `vocabulary` rows: the head's padding rows mean nothing to any student, so their mass stays in the tail.

It refuses ids outside the vocabulary and ids given twice at one position. It knows no model, queue or wire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from potstill.errors import AlignmentError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    """Natural-log float32 scores of N rows; what was not asked for is None. Tails are log mass left outside the K."""

    sampled: Tensor  # [N]
    topk_ids: Tensor | None = None  # [N, K] int64, most probable first
    topk_logprobs: Tensor | None = None  # [N, K]
    topk_tail: Tensor | None = None  # [N]
    ids_logprobs: Tensor | None = None  # [N, K]
    ids_tail: Tensor | None = None  # [N]
    entropy: Tensor | None = None  # [N] nats


def score_rows(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    targets: Tensor,
    token_ids: Tensor | None,
    top_k: int,
    entropy: bool,
    vocabulary: int,
    chunk_rows: int,
) -> RowScores:
    """Score `targets` [N] after `hidden` [N, H], and what else is asked for. `head` maps [n, H] to logits [n, V].

    `token_ids` [N, K] are ids of the caller's choice; `top_k` 0 means no top-k.
    Raises AlignmentError when lengths differ, an id is outside the vocabulary, or a position repeats an id.
    """
    check_ids("targets", targets[:, None], rows=len(hidden), vocabulary=vocabulary)
    if token_ids is not None:
        check_ids("token_ids", token_ids, rows=len(hidden), vocabulary=vocabulary)
    if not 0 <= top_k <= vocabulary:
        raise AlignmentError(f"top_k is {top_k}; the vocabulary has {vocabulary} tokens")
    parts = [
        score_logits(
            head(hidden[rows]),
            targets=targets[rows],
            token_ids=None if token_ids is None else token_ids[rows],
            top_k=top_k,
            entropy=entropy,
            vocabulary=vocabulary,
        )
        for rows in _chunks(len(hidden), chunk_rows)
    ]
    return _concatenate(parts)


def score_logits(
    logits: Tensor, *, targets: Tensor, token_ids: Tensor | None, top_k: int, entropy: bool, vocabulary: int
) -> RowScores:
    """As `score_rows`, for one chunk of logits [n, V]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = torch.topk(logprobs[:, :vocabulary], top_k, dim=-1) if top_k else None
    return RowScores(
        sampled=_pick(logprobs, targets[:, None])[:, 0],
        topk_ids=best.indices if best else None,
        topk_logprobs=best.values if best else None,
        topk_tail=log_mass_outside(logprobs, best.indices) if best else None,
        ids_logprobs=_pick(logprobs, token_ids) if token_ids is not None else None,
        ids_tail=log_mass_outside(logprobs, token_ids) if token_ids is not None else None,
        entropy=torch.special.entr(logprobs.exp()).sum(-1) if entropy else None,
    )


def log_mass_outside(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log of the probability outside `ids` [n, K], for `logprobs` [n, V]; -inf when nothing is outside.

    Summing what is left is exact down to the smallest float. log(1 - sum of the K), which needs no second pass over
    the vocabulary, has lost every digit once the rest is below 1e-7, as it is for most tokens of a sure teacher.
    """
    return logprobs.scatter(-1, ids.long(), -torch.inf).logsumexp(-1)


def check_ids(name: str, ids: Tensor, *, rows: int, vocabulary: int) -> None:
    """Raise AlignmentError unless `ids` [rows, K] are known to the vocabulary and distinct within a row."""
    if len(ids) != rows:
        raise AlignmentError(f"{name} has {len(ids)} rows, there are {rows} positions")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise AlignmentError(f"{name} holds an id outside the vocabulary of {vocabulary} tokens")
    ordered = ids.sort(dim=-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise AlignmentError(f"{name} repeats an id within one position")


def _pick(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.gather(-1, ids.long())


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _concatenate(parts: list[RowScores]) -> RowScores:
    def column(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return RowScores(**{field.name: column(field.name) for field in fields(RowScores)})
