"""What scoring needs of a model: the hidden states that its head reads, and that head. One protocol, many engines.

A backbone knows no tokenizer, no top-k and no wire, and computes no logits: those are written once, in scoring.py.
It refuses, when it is made, a model whose logits are more than head · hidden (a bias, a cap, a scale): whatever scored
such a model this way would be wrong without a sign of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from teacher_server.batching import Job


class Backbone(Protocol):
    """One thread calls it. Sizes and precision are the head's: V, H = head.shape."""

    @property
    def head(self) -> Tensor:
        """[V, H] as of the latest weights; logits are hidden · headᵀ and nothing more. V may exceed the tokenizer's."""

    @property
    def context_length(self) -> int:
        """Tokens of context and completion together."""

    def hidden_states(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Per job [T, H]: after the final norm, row t from the position that predicts completion token t."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace every weight; names are those of the model's checkpoint. All or nothing.

        Raises WeightsError for a missing or unknown name or another shape, before anything is touched.
        """
