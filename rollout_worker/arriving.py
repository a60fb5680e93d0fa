"""What an engine loads a version from: tensors that are all here, or that come from the learner's device one by one.

The first are checked before any of them is handed on. The second are checked each before it is, so that what an engine
has loaded of a version that fails midway is sound, but half: such an engine must not serve until a later one is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from potstill.errors import WeightsError
from potstill.transports import rows
from potstill.transports.device import Stream
from potstill.types import TensorEntry, WeightsVersion


class Weights(Protocol):
    """Every weight of one version, once."""

    def begin(self) -> None:
        """Called before an engine touches its own. Raises StaleWeights when there is no such version any more."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """By name; a tensor is read before the next is asked for, or kept. Raises WeightsError in between."""
        ...

    def end(self) -> None:
        """Called when all of them are loaded."""
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """Checked, and in this process."""

    tensors: Mapping[str, Tensor]

    def begin(self) -> None:
        """They are here."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())

    def end(self) -> None:
        """Whoever lent them sees when nobody refers to them."""


@dataclass(frozen=True, slots=True)
class Coming:
    """From the learner's device. `version` is one whose table was checked."""

    version: WeightsVersion
    stream: Stream

    def begin(self) -> None:
        self.stream.begin()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        expected = list(zip(self.version.tensors, self.version.checksums, strict=True))
        try:
            for start, piece in self.stream:
                if piece.is_cuda:
                    piece.record_stream(torch.cuda.current_stream(piece.device))
                stop = start + len(piece)
                within = [pair for pair in expected if start <= pair[0].offset < stop]
                yield from self._checked(start, piece, within)
                expected = expected[len(within) :]
            if expected:
                raise WeightsError(f"weights version {self.version.version}: {expected[0][0].name} did not come")
        except BaseException:
            self.stream.drop()
            raise

    def end(self) -> None:
        self.stream.end()

    def _checked(
        self, start: int, piece: Tensor, expected: list[tuple[TensorEntry, int]]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a piece. Raises WeightsError, before the first of them, for one that is damaged."""
        found = rows.sums([rows.row(piece, entry, start) for entry, _ in expected])
        damaged = [entry.name for (entry, wanted), got in zip(expected, found, strict=True) if got != wanted]
        if damaged:
            raise WeightsError(
                f"weights version {self.version.version}: other bytes came than were sent, of {', '.join(damaged)}"
            )
        for entry, _ in expected:
            yield entry.name, rows.tensor(piece, entry, start)
