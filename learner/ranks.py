"""How many processes make one step of the learner, and where its weights lie: here, or in shards over all of them.

    the same batch ─┬─► rank 0: its micro-batches ─► losses, measures, gradients ─┬─► summed ─► the same step everywhere
                    └─► rank 1: its micro-batches ─► losses, measures, gradients ─┘

A sum, never a mean: the denominators are those of the whole step. Ranks meet in every pass, so each makes as many as
the others, and every verb below is called on all of them, in the same order.

Here is the one process that meets nobody, for which each verb is free; several are in learner/parallel.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from learner.logprobs import Tally
from learner.packing import Packed

if TYPE_CHECKING:
    from learner.model import CausalModel


class Ranks(Protocol):
    """Whom a model is shared with (`CausalModel.ranks`)."""

    rank: int
    size: int

    @property
    def home(self) -> torch.device:
        """Where a model is loaded, before `shard`."""

    def shard(self, model: CausalModel) -> CausalModel:
        """The model itself, of which each rank keeps a share from now on."""

    def total(self, tally: Tally) -> Tally:
        """What all ranks' tallies add up to, the same to the last bit on each."""

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of tensors that lie as the model's weights do, taken as one vector."""

    def settle(self, model: CausalModel) -> None:
        """After the passes of a verb: its parameters are the shards again, which an optimizer moves."""

    def read(self, model: CausalModel, weights: Mapping[str, Tensor], packed: Packed) -> tuple[Tensor, Tensor]:
        """(states, head) of a pass on other weights, in the model's dtypes; by its names, and they lie as its own do.

        There is no gradient.
        """

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put together, for rank 0 to write; nothing on the others."""

    def lay(self, whole: Tensor, *, like: Tensor) -> Tensor:
        """A tensor that every rank has whole, where and as `like` lies."""


class Alone:
    """One process, which has everything."""

    rank = 0
    size = 1

    @property
    def home(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def shard(self, model: CausalModel) -> CausalModel:
        return model

    def total(self, tally: Tally) -> Tally:
        return tally

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(tensors)

    def settle(self, model: CausalModel) -> None:
        """Nothing was put together."""

    def read(self, model: CausalModel, weights: Mapping[str, Tensor], packed: Packed) -> tuple[Tensor, Tensor]:
        named = {name: parameter for name, parameter in model.named_parameters() if name in weights}
        cast = {name: weights[name].to(parameter.dtype) for name, parameter in named.items()}
        hidden: Tensor = functional_call(model, cast, (packed,))
        return hidden, next((cast[name] for name, parameter in named.items() if parameter is model.head), model.head)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def lay(self, whole: Tensor, *, like: Tensor) -> Tensor:
        return whole.to(like.device)
