"""Attention over packed sequences: each attends to itself alone.

Registered with transformers as the attention implementation "packed". Linear layers see one row without padding; only
here are the sequences set side by side, padded on the right, where a causal mask already hides the padding. So the
fast causal kernel runs without a mask, and the cost is that of the sequences, not of the row squared.

Refuses sliding windows: a model that uses them would silently see too far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATION = "packed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the packed rows go. L is the longest sequence. Example for lengths (2, 1):

    spread  [[0, 1], [2, 2]]     packed row at [sequence, position]; padding repeats the last row, any would do
    gather  [0, 1, 2]            flat position in [S · L] of each packed row
    """

    spread: Tensor  # [S, L] i64
    gather: Tensor  # [N] i64

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Layout:
        counts = torch.tensor(lengths, device=device)
        starts = counts.cumsum(0) - counts
        steps = torch.arange(max(lengths), device=device)
        inside = steps < counts[:, None]
        last = int(counts.sum()) - 1
        return cls(
            spread=(starts[:, None] + steps).clamp(max=last),
            gather=inside.flatten().nonzero().squeeze(-1),
        )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, G, N, D] → [1, N, H, D]."""
    if sliding_window is not None:
        raise NotImplementedError("packed attention has no sliding window")

    def spread(states: Tensor) -> Tensor:
        return states[0].transpose(0, 1)[layout.spread].transpose(1, 2)  # [S, H, L, D]

    attended = scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1)[layout.gather].unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout says who attends to whom."""


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
