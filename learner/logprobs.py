"""From hidden states to a loss without ever holding [tokens × vocabulary].

The output head is the largest product of a small model and the largest tensor of any. Logits exist for one chunk of
rows at a time, in float32; the chunk's loss and its gradient with respect to those logits are formed at once, folded
into the gradients of hidden states and head, and the chunk is forgotten. One pass, nothing recomputed.

The row loss is any function of logits: this file knows no objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

RowLoss = Callable[[Tensor, slice], tuple[Tensor, Mapping[str, Tensor]]]
"""(logits [C, V] in float32, rows) → (loss [C], metrics {name: [C]}). `rows` says which rows of the batch these are."""


def head_loss(
    hidden: Tensor, head: Tensor, row_loss: RowLoss, *, weights: Tensor, chunk_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weights · loss over all rows, differentiable in hidden and head, and each metric's plain sum over rows.

    hidden   [N, D] states that predict the N loss tokens
    head     [V, D] weight of the output layer
    weights  [N]    from aggregation.token_weights

    A metric that is NaN in a row makes its sum NaN: missing is not zero.
    """
    sums: dict[str, Tensor] = {}
    loss = _HeadLoss.apply(hidden, head, row_loss, weights, chunk_tokens, sums)  # type: ignore[no-untyped-call]
    return loss, sums


@torch.no_grad()
def id_logprobs(hidden: Tensor, head: Tensor, ids: Tensor, *, chunk_tokens: int) -> Tensor:
    """Log-probs [N, K] of the ids [N, K] at the states [N, D], a chunk of rows at a time. No gradient."""
    parts = []
    for start in range(0, len(hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        parts.append(upcast(hidden[rows] @ head.T).log_softmax(-1).gather(-1, ids[rows]))
    return torch.cat(parts)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        row_loss: RowLoss,
        weights: Tensor,
        chunk_tokens: int,
        sums: dict[str, Tensor],
    ) -> Tensor:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head) if need_head else None
        total = torch.zeros((), dtype=accumulator(hidden.dtype), device=hidden.device)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, len(hidden)))
            logits = upcast(hidden[rows] @ head.T)
            loss, gradient = _chunk(logits, row_loss, weights[rows], rows, sums, need_hidden or need_head)
            total += loss
            if gradient is None:
                continue
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, head, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head.addmm_(gradient.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)
        return grad_hidden, grad_head, None, None, None, None


def _chunk(
    logits: Tensor, row_loss: RowLoss, weights: Tensor, rows: slice, sums: dict[str, Tensor], need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    logits.requires_grad_(need_grad)
    with torch.set_grad_enabled(need_grad):
        losses, metrics = row_loss(logits, rows)
        loss = (losses * weights).sum()
    for name, values in metrics.items():
        value = values.detach().sum(dtype=torch.float64)
        sums[name] = value if name not in sums else sums[name] + value
    return loss.detach(), torch.autograd.grad(loss, logits)[0] if need_grad else None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(logits: Tensor) -> Tensor:
    """Log-probs are taken in float32 whatever the model's dtype; float64 stays for tests."""
    return logits.to(accumulator(logits.dtype))
