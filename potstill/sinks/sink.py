"""What every sink is told, in which order, and what it may answer.

    open ─► (rewind │ step │ note)* ─► finish      open again after SinkLost

A number that was not measured is not told: a sink never sees NaN, null, or a 0 in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from potstill.errors import SinkError


class SinkLost(SinkError):
    """The sink takes nothing more until it is opened again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of the run. `config` is the resolved one: it says where secrets are kept, and holds none."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    resumed: bool  # whether the sink may have been told of this run before


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Numbers of optimizer step `step`, all finite. A step comes more than once: its metrics, then an evaluation."""

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """An event of level warn or error, heard after `step`."""

    step: int
    time: float
    level: str
    type: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """The run is back at `step`: what was told of later ones is undone, and they come again."""

    step: int
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the run ended: a final status, or the last one of a run that did not get so far; the report's headline."""

    status: str
    step: int
    time: float
    headline: Mapping[str, float]


Record: TypeAlias = Step | Note | Rewind


class Sink(Protocol):
    """Takes a run's records. Every method may raise SinkError, and takes as long as it likes."""

    def open(self, facts: Facts) -> None: ...

    def step(self, step: Step) -> None: ...

    def note(self, note: Note) -> None: ...

    def rewind(self, rewind: Rewind) -> None: ...

    def finish(self, ending: Ending) -> None:
        """The last call. What it returns from is told."""


def hand(sink: Sink, record: Record) -> None:
    """Call the method that the record is for."""
    match record:
        case Step():
            sink.step(record)
        case Note():
            sink.note(record)
        case Rewind():
            sink.rewind(record)
