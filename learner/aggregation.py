"""How tokens are added up: one weight per loss token, so that the loss is Σ weight · ℓ on any split of the step.

Denominators are those of the whole optimizer step and are required: a micro-batch or a rank that divided by its own
count would weigh its tokens by the company they keep. There is no padding here, only lengths.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.algebra.aggregations import (
    Aggregation,
    Constant,
    SequenceMean,
    SequenceSum,
    TokenBudget,
    TokenMean,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Of one optimizer step, over all its micro-batches and ranks."""

    num_loss_tokens: int  # tokens that carry everything the objective reads
    num_sequences: int  # completions with at least one such token

    def __post_init__(self) -> None:
        if self.num_loss_tokens < 1 or not 1 <= self.num_sequences <= self.num_loss_tokens:
            raise ValueError(f"no step can be divided by {self}")


def subsets(lengths: Sequence[int], origins: Sequence[str]) -> dict[str, Denominators]:
    """Denominators of a step by what a term is over: "all", and each origin that has a loss token.

    lengths, origins  of every completion of the step: its loss tokens, and who wrote it
    """
    found = {}
    for over in ["all", *dict.fromkeys(origins)]:
        counts = [n for n, origin in zip(lengths, origins, strict=True) if n > 0 and over in {"all", origin}]
        if counts:
            found[over] = Denominators(num_loss_tokens=sum(counts), num_sequences=len(counts))
    return found


def token_weights(lengths: Sequence[int], *, aggregation: Aggregation, denominators: Denominators) -> Tensor:
    """Float64 weights [Σ lengths] for completions of these many loss tokens, which are a part of the step or all of it.

    Raises ValueError when the denominators cannot be those of a step which contains these completions, and when they
    exceed a token budget: `budget_keep` cuts the whole step, before it is split.

    >>> step = Denominators(num_loss_tokens=5, num_sequences=2)
    >>> token_weights([1, 4], aggregation=SequenceMean(), denominators=step).tolist()
    [0.5, 0.125, 0.125, 0.125, 0.125]
    """
    tokens, sequences = denominators.num_loss_tokens, denominators.num_sequences
    if sum(lengths) > tokens or sum(length > 0 for length in lengths) > sequences:
        raise ValueError(f"{denominators} are smaller than the {sum(lengths)} tokens of {len(lengths)} sequences here")
    if isinstance(aggregation, TokenBudget) and sum(lengths) > aggregation.tokens:
        raise ValueError(f"{sum(lengths)} tokens exceed the budget of {aggregation.tokens}; cut them with budget_keep")
    filled = [length for length in lengths if length > 0]
    weights = [_token_weight(length, aggregation, denominators) for length in filled]
    return torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(filled, dtype=torch.long))


def _token_weight(length: int, aggregation: Aggregation, denominators: Denominators) -> float:
    """Of each token of a completion with `length` > 0 loss tokens."""
    match aggregation:
        case TokenMean():
            return 1 / denominators.num_loss_tokens
        case SequenceMean():
            return 1 / (denominators.num_sequences * length)
        case SequenceSum():
            return 1 / denominators.num_sequences
        case Constant(length=constant):
            return 1 / (denominators.num_sequences * constant)
        case TokenBudget(tokens=budget):
            return 1 / budget


def budget_keep(lengths: Sequence[int], *, tokens: int, seed: int) -> tuple[int, ...]:
    """How many of each completion's loss tokens a step keeps, from its first on (C3PO, Ring-lite, arXiv 2506.14731).

    Whole completions in an order drawn from `seed`, until `tokens` are full; the last one is cut. All are kept where
    there is room. `lengths` are those of the whole step, in an order on which all ranks agree, and rewards are centred
    before: a cut changes nobody's advantage.

    >>> sorted(budget_keep([4, 4, 4], tokens=6, seed=0))
    [0, 2, 4]
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    kept = [0] * len(lengths)
    room = tokens
    for index in order:
        kept[index] = min(lengths[index], room)
        room -= kept[index]
    return tuple(kept)
