"""Hidden states and a head to log-probs of the tokens asked for: pure torch, float32, temperature 1.

Legend: N rows (one per completion token), H hidden size, V rows of the head, K entries of a top-k, M draws.
Rows go through the head in chunks: two [chunk, V] buffers exist, are made once per call, and every step works in them.
The softmax runs over all V rows of the head, which is the distribution the model really has. A top-k and draws are
taken among the first `vocabulary` rows: the head's padding rows mean nothing to any student, so their mass stays in
the tail.

It refuses ids outside the vocabulary and ids given twice at one position. It knows no model, queue or wire.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from potstill.errors import AlignmentError
from potstill.wire import Ask

_FAN = 8  # columns of a block of which a top-k first sees the maximum; 4 and 16 are no faster
_RUN = 64  # neighbours that a draw treats as one at first
_CONVERTED_ROWS = 4096  # of a head in half precision that exist in float32 at a time


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
    drawn_ids: Tensor | None = None  # [N, M] int64, in the order of the uniforms
    drawn_logprobs: Tensor | None = None  # [N, M] log p, not renormalised
    hidden: Tensor | None = None  # [N, H] bfloat16, rounded to nearest even


def score_rows(
    hidden: Tensor,
    head: Tensor,
    *,
    targets: Tensor,
    token_ids: Tensor | None,
    ask: Ask,
    uniforms: Tensor | None,
    vocabulary: int,
    chunk_rows: int,
) -> RowScores:
    """Score `targets` [N] after `hidden` [N, H], and what else is asked for; logits are hidden · headᵀ, head [V, H].

    token_ids  [N, ask.num_ids] ids of the caller's choice
    uniforms   [N, ask.draws] float64 of [0, 1): they alone decide the draws, each by the inverse of the distribution
               function over the tokens that are not in the row's top-k

    Raises AlignmentError when lengths differ, an id is outside the vocabulary, or a position repeats an id.
    """
    _check(hidden, ask, targets=targets, token_ids=token_ids, uniforms=uniforms, vocabulary=vocabulary)
    size = min(chunk_rows, len(hidden))
    logits, logprobs = (torch.empty(size, len(head), device=head.device) for _ in range(2))
    parts = []
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        height = rows.stop - rows.start
        project(hidden[rows], head, out=logits[:height])
        torch.log_softmax(logits[:height], -1, out=logprobs[:height])
        parts.append(
            _score_chunk(
                logprobs[:height],
                logits[:height],
                targets=targets[rows],
                token_ids=None if token_ids is None else token_ids[rows],
                uniforms=None if uniforms is None else uniforms[rows],
                ask=ask,
                vocabulary=vocabulary,
            )
        )
    return _concatenate(parts, hidden=hidden.to(torch.bfloat16) if ask.hidden else None)


def project(hidden: Tensor, head: Tensor, *, out: Tensor) -> None:
    """Write hidden · headᵀ to `out` [n, V] in float32, which a head in half precision would not do by itself.

    Logits near 16 in bfloat16 are 0.06 apart: as far as a teacher and a good student.
    """
    if head.dtype == torch.float32:
        torch.mm(hidden, head.T, out=out)
        return
    hidden = hidden.float()
    for start in range(0, len(head), _CONVERTED_ROWS):
        rows = head[start : start + _CONVERTED_ROWS].float()
        torch.mm(hidden, rows.T, out=out[:, start : start + _CONVERTED_ROWS])


def _score_chunk(
    logprobs: Tensor,
    spare: Tensor,
    *,
    targets: Tensor,
    token_ids: Tensor | None,
    uniforms: Tensor | None,
    ask: Ask,
    vocabulary: int,
) -> RowScores:
    """Scores of one chunk [n, V]; both buffers are overwritten. What reads all of `logprobs` stands first."""
    known = logprobs[:, :vocabulary]
    found: dict[str, Tensor] = {"sampled": logprobs.gather(-1, targets[:, None])[:, 0]}
    if ask.entropy:
        found["entropy"] = -torch.linalg.vecdot(torch.exp(logprobs, out=spare), logprobs)
    if token_ids is not None:
        found["ids_logprobs"] = logprobs.gather(-1, token_ids)
        found["ids_tail"] = log_mass_outside(logprobs, token_ids, spare=spare)
        logprobs.scatter_(-1, token_ids, found["ids_logprobs"])
    if ask.top_k:
        found["topk_logprobs"], found["topk_ids"] = top(known, ask.top_k)
        found["topk_tail"] = log_mass_outside(logprobs, found["topk_ids"], spare=spare)
    if uniforms is not None:
        found["drawn_ids"] = draw(known, uniforms, spare=spare[:, :vocabulary])
        found["drawn_logprobs"] = logprobs.gather(-1, found["drawn_ids"])
    return RowScores(**found)


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [n, C], largest first, and their columns: torch.topk, in less than half of its time.

    Every one of the k lies in a block whose own maximum is among the k largest maxima: those blocks are found by the
    same function, and only they are sorted. A block's columns lie C / _FAN apart: maxima of whole rows are fast.
    """
    width = values.shape[-1] // _FAN
    if width < 4 * k:
        found = values.topk(k)
        return found.values, found.indices
    blocked = _FAN * width
    _, blocks = top(values[:, :blocked].view(-1, _FAN, width).amax(1), k)
    offsets = width * torch.arange(_FAN, device=values.device)
    left_over = torch.arange(blocked, values.shape[-1], device=values.device).expand(len(values), -1)
    columns = torch.cat([(blocks[:, None] + offsets[:, None]).flatten(1), left_over], dim=-1)
    best = values.gather(-1, columns).topk(k)
    return best.values, columns.gather(-1, best.indices)


def log_mass_outside(logprobs: Tensor, ids: Tensor, *, spare: Tensor) -> Tensor:
    """Log of the probability outside `ids` [n, K] of `logprobs` [n, V]; -inf when nothing is. Leaves -inf at `ids`.

    Summing what is left is exact however little it is. log(1 - sum of the K), which needs no second pass over the
    vocabulary, has lost every digit once the rest is below 1e-7, as it is for most tokens of a sure teacher.
    """
    logprobs.scatter_(-1, ids, -torch.inf)
    # The largest falls by the logsumexp. torch.log_softmax is one pass in place; torch.logsumexp is four and a copy.
    largest = logprobs.amax(-1)
    fallen = torch.log_softmax(logprobs, -1, out=spare).amax(-1)
    return torch.where(largest == -torch.inf, largest, largest - fallen)


def draw(logprobs: Tensor, uniforms: Tensor, *, spare: Tensor) -> Tensor:
    """For each of `uniforms` [n, M] a column of `logprobs` [n, C], as probable as exp says, renormalised; -inf: never.

    The inverse of the distribution function, in two steps, since a float64 sum over the whole vocabulary would cost as
    much as the head: first a run of neighbours, then one of them by what is left of the uniform.
    """
    weights = torch.sub(logprobs, logprobs.amax(-1, keepdim=True), out=spare).exp_()
    whole = weights.shape[-1] // _RUN * _RUN
    sums = weights[:, :whole].view(len(weights), -1, _RUN).sum(-1)
    if whole < weights.shape[-1]:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    cumulative = sums.double().cumsum(-1)
    runs, left = _invert(cumulative, uniforms * cumulative[:, -1:])
    columns = _RUN * runs[..., None] + torch.arange(_RUN, device=runs.device)  # [n, M, _RUN]
    inside = columns < weights.shape[-1]
    columns = columns.clamp(max=weights.shape[-1] - 1)
    near = weights.gather(-1, columns.flatten(1)).view_as(columns) * inside
    places, _ = _invert(near.double().cumsum(-1), left[..., None])
    return columns.gather(-1, places)[..., 0]


def check_ids(name: str, ids: Tensor, *, rows: int, vocabulary: int) -> None:
    """Raise AlignmentError unless `ids` [rows, K] are known to the vocabulary and distinct within a row."""
    if len(ids) != rows:
        raise AlignmentError(f"{name} has {len(ids)} rows, there are {rows} positions")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise AlignmentError(f"{name} holds an id outside the vocabulary of {vocabulary} tokens")
    ordered = ids.sort(dim=-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise AlignmentError(f"{name} repeats an id within one position")


def _invert(cumulative: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor]:
    """The first column at which `cumulative` [..., C] exceeds each amount [..., M], and what the amount has beyond
    the column before it. Rounding may bring an amount to the total: it counts as just below, so that a column that
    adds nothing is never found."""
    total = cumulative[..., -1:]
    amounts = amounts.minimum(total.nextafter(torch.zeros_like(total)))
    columns = torch.searchsorted(cumulative, amounts, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = torch.where(columns > 0, cumulative.gather(-1, (columns - 1).clamp(min=0)), 0.0)
    return columns, amounts - before


def _check(
    hidden: Tensor, ask: Ask, *, targets: Tensor, token_ids: Tensor | None, uniforms: Tensor | None, vocabulary: int
) -> None:
    rows = len(hidden)
    check_ids("targets", targets[:, None], rows=rows, vocabulary=vocabulary)
    if token_ids is not None:
        check_ids("token_ids", token_ids, rows=rows, vocabulary=vocabulary)
    shapes = {"token_ids": (token_ids, ask.num_ids), "uniforms": (uniforms, ask.draws)}
    for name, (given, columns) in shapes.items():
        shape = None if given is None else tuple(given.shape)
        if shape != ((rows, columns) if columns else None):
            raise AlignmentError(f"{name} has shape {shape}, asked are {columns} at each of {rows} positions")
    if ask.top_k > vocabulary or (ask.draws and ask.top_k == vocabulary):
        raise AlignmentError(f"top_k is {ask.top_k}; the vocabulary has {vocabulary} tokens, some for the draws")
    if ask.hidden not in {0, hidden.shape[-1]}:
        raise AlignmentError(f"hidden is {ask.hidden}; the states are {hidden.shape[-1]} wide")


def _concatenate(parts: list[RowScores], *, hidden: Tensor | None) -> RowScores:
    def column(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    columns = {field.name: column(field.name) for field in fields(RowScores) if field.name != "hidden"}
    return RowScores(**columns, hidden=hidden)
