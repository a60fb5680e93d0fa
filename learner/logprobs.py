"""From hidden states to a loss without ever holding [tokens × vocabulary].

The output head is the largest product of a small model and the largest tensor of any. Logits exist for one chunk of
rows at a time, as many as the products want. The loss is taken of a block of them, as few as a CPU's caches want, in
float32; its gradient with respect to the logits takes their place. A chunk of gradients is folded into those of hidden
states and head, and forgotten. One pass, nothing recomputed.

The row loss is any function of logits: this file knows no objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from learner.facts import Logits

CACHED_LOGITS = 2**18
"""Of a block on a CPU, 1 MiB in float32: what a loss makes of a block stays in a cache, and in the allocator's pool."""

Number = TypeVar("Number", Tensor, int)

RowLoss = Callable[[Tensor, slice], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""(logits [C, V] in float32, rows) → (losses by term, to be added up; measures {name: [c]} of c ≤ C of the rows).

`rows` says which rows of the batch these are. It keeps no view of the logits, which are overwritten. Where no row
counts there are no losses.
"""


@dataclass(slots=True)
class Tally:
    """What a pass over the rows adds up to. A measure that is NaN in a row makes its sum NaN: missing is not zero."""

    losses: dict[str, Tensor] = field(default_factory=dict)  # each term's part of the loss
    sums: dict[str, Tensor] = field(default_factory=dict)  # of each measure, over the rows that have it
    counts: dict[str, int] = field(default_factory=dict)  # and how many those are

    def add(self, losses: Mapping[str, Tensor], measures: Mapping[str, Tensor]) -> None:
        _add_up(self.losses, {name: loss.detach().double() for name, loss in losses.items()})
        _add_up(self.sums, {name: rows.detach().sum(dtype=torch.float64) for name, rows in measures.items()})
        _add_up(self.counts, {name: len(rows) for name, rows in measures.items()})

    def merge(self, other: Tally) -> None:
        """Add another pass, e.g. of the next micro-batch."""
        _add_up(self.losses, other.losses)
        _add_up(self.sums, other.sums)
        _add_up(self.counts, other.counts)


def _add_up(totals: dict[str, Number], parts: Mapping[str, Number]) -> None:
    """Each part joins the total of its name; the first of a name is its total."""
    for name, part in parts.items():
        totals[name] = totals[name] + part if name in totals else part


def head_loss(hidden: Tensor, head: Tensor, row_loss: RowLoss, *, chunk_tokens: int) -> tuple[Tensor, Tally]:
    """The sum of all losses over all rows, differentiable in hidden and head, and the tally of its parts.

    hidden   [N, D] states that predict the N loss tokens
    head     [V, D] weight of the output layer

    Where gradients are switched off none is computed.
    """
    tally = Tally()
    if not torch.is_grad_enabled():
        hidden, head = hidden.detach(), head.detach()
    loss = _HeadLoss.apply(hidden, head, row_loss, chunk_tokens, tally)  # type: ignore[no-untyped-call]
    return loss, tally


@torch.no_grad()
def id_logprobs(logits: Logits, ids: Tensor, *, chunk_tokens: int) -> Tensor:
    """Log-probs [N, K] of the ids [N, K], a chunk of rows at a time."""
    rows = torch.arange(len(ids), device=ids.device)
    parts = [logits(part).log_softmax(-1).gather(-1, ids[part]) for part in torch.split(rows, chunk_tokens)]
    return torch.cat(parts)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        row_loss: RowLoss,
        chunk_tokens: int,
        tally: Tally,
    ) -> Tensor:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head, dtype=accumulator(head.dtype)) if need_head else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        buffer = hidden.new_empty(min(chunk_tokens, len(hidden)), len(head))
        for start in range(0, len(hidden), chunk_tokens):
            states = hidden[start : start + chunk_tokens]
            logits = torch.mm(states, head.T, out=buffer[: len(states)])
            loss, learns = _replaced_by_gradient(logits, start, row_loss, tally, need_hidden or need_head)
            total += loss
            if not learns:
                continue
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[start : start + chunk_tokens])
            if grad_head is not None:
                _add_product(grad_head, logits.T, states)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total.to(accumulator(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)
        return grad_hidden, grad_head, None, None, None


def _replaced_by_gradient(
    logits: Tensor, start: int, row_loss: RowLoss, tally: Tally, need_grad: bool
) -> tuple[Tensor, bool]:
    """The loss of a chunk whose first row is `start`, and whether it has a gradient.

    Its logits make way for the gradient with respect to them.
    """
    learns = False
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for block in torch.split(logits, _rows_at_once(logits)):
        own = upcast(block.detach()).requires_grad_(need_grad)
        with torch.set_grad_enabled(need_grad):
            losses, measures = row_loss(own, slice(start, start + len(block)))
            loss = sum(losses.values(), start=torch.zeros_like(total))
        tally.add(losses, measures)
        total += loss.detach()
        if loss.requires_grad:
            block.copy_(torch.autograd.grad(loss, own)[0])
            learns = True
        else:  # no row of this block counts
            block.zero_()
        start += len(block)
    return total, learns


def _rows_at_once(logits: Tensor) -> int:
    """Rows whose loss is taken together: all, but on a CPU few, and still one for each thread."""
    if logits.device.type != "cpu":
        return len(logits)
    return max(torch.get_num_threads(), CACHED_LOGITS // logits.shape[-1])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, D] += left [V, C] @ right [C, D]; a total of a wider dtype takes it in parts no larger than left."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    num_rows = max(1, left.numel() // right.shape[-1])
    for part, rows in zip(torch.split(total, num_rows), torch.split(left, num_rows), strict=True):
        part += rows @ right


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(logits: Tensor) -> Tensor:
    """Log-probs are taken in float32 whatever the model's dtype; float64 stays for tests."""
    return logits.to(accumulator(logits.dtype))
