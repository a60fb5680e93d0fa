"""How positions are added up: one weight per loss token, so that the loss is Σ weight · ℓ on any split of the batch.

Denominators are those of the whole optimizer step and are required: a micro-batch or a rank that divided by its own
count would weigh its tokens by the company they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Of one optimizer step, over all its micro-batches and ranks."""

    num_loss_tokens: int  # tokens that carry everything the objective reads
    num_sequences: int  # sequences with at least one such token

    def __post_init__(self) -> None:
        if self.num_loss_tokens < 1 or not 1 <= self.num_sequences <= self.num_loss_tokens:
            raise ValueError(f"no step can be divided by {self}")


def token_weights(lengths: Sequence[int], *, aggregation: Aggregation, denominators: Denominators) -> Tensor:
    """Weights [Σ lengths] for sequences of these many loss tokens.

    token_mean: 1 / num_loss_tokens. sequence_mean: 1 / (num_sequences · length), for sequences with any loss token.
    Raises ValueError when the denominators cannot be those of a step which contains these sequences.
    """
    tokens, sequences = denominators.num_loss_tokens, denominators.num_sequences
    if sum(lengths) > tokens or sum(length > 0 for length in lengths) > sequences:
        raise ValueError(f"{denominators} are smaller than the {sum(lengths)} tokens of {len(lengths)} sequences here")
    counts = torch.tensor(lengths, dtype=torch.float64)
    if aggregation == "token_mean":
        per_sequence = torch.full_like(counts, 1 / tokens)
    else:
        per_sequence = 1 / (counts.clamp(min=1) * sequences)
    return per_sequence.repeat_interleave(counts.long()).float()
