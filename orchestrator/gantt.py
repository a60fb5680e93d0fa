"""The drawing of a timeline: processes as lanes, spans as marks, and the steps and moments that they lie between.

Geometry only: numbers for a template, in units across the chart and pixels down. Spans too short to see are one mark,
as wide as they are in all, so that the ink stays true and a page stays small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.pieces import STAGES, Piece, clip, flatten, overlaps, stage_of
from potstill.spans import Span

UNITS = 10_000  # across the chart, whatever its width on a screen
MARKS = 16_000  # drawn at most, of about 70 bytes each
ROW_PX, LANE_GAP_PX = 16, 12
TICKS, STEP_LABELS = 10, 12  # more would touch each other
SEEN = 0.001  # of the width: about a pixel


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What is shown of a run, in seconds since 1970, and where the run began and ended."""

    start: float
    end: float
    run_start: float
    run_end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def whole(self) -> bool:
        return self.start == self.run_start and self.end == self.run_end

    def units(self, moment: float) -> float:
        """Where a moment lies across the chart."""
        return UNITS * (moment - self.start) / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A rectangle of a lane, in units across the chart. `label` says of what it is, or how many spans it stands for."""

    x: float
    width: float
    stage: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A process. It has a second row where two things ran at once."""

    process: str
    top: int
    rows: Sequence[Sequence[Mark]]

    @property
    def bottom(self) -> int:
        return self.top + ROW_PX * len(self.rows)


def lanes(by_process: Mapping[str, Sequence[Span]], shown: Window) -> list[Lane]:
    """The processes below each other, drawn so coarsely that all marks fit a page."""
    pieces = {process: _rows(clip(own, start=shown.start, end=shown.end), shown) for process, own in by_process.items()}
    cell = shown.seconds / UNITS
    while sum(sum(1 for _ in blobs(row, cell)) for rows in pieces.values() for row in rows) > MARKS:
        cell *= 2
    top, found = 0, []
    for process, rows in pieces.items():
        marks = [[_mark(blob, shown) for blob in blobs(row, cell)] for row in rows]
        found.append(Lane(process=process, top=top, rows=marks))
        top = found[-1].bottom + LANE_GAP_PX
    return found


def blobs(pieces: Sequence[Piece], cell: float) -> Iterator[list[Piece]]:
    """Neighbours that lie within `cell` seconds together; a piece that is longer stays alone."""
    blob: list[Piece] = []
    for piece in pieces:
        if blob and piece.end - blob[0].start > cell:
            yield blob
            blob = []
        blob.append(piece)
    if blob:
        yield blob


def steps(spans: Iterable[Span], shown: Window) -> list[tuple[int, float]]:
    """When each step's training ended, in units across the chart; of several ranks, when the last one's did."""
    ends: dict[int, float] = {}
    for span in spans:
        if span.name == "train" and span.step is not None:
            ends[span.step] = max(span.end, ends.get(span.step, span.end))
    return [(step, shown.units(end)) for step, end in sorted(ends.items()) if shown.start <= end <= shown.end]


def ticks(shown: Window) -> list[tuple[float, str]]:
    """Round moments of the run: (units across the chart, name)."""
    gap = next(gap for gap in _round_gaps() if shown.seconds / gap <= TICKS)
    first = shown.start - shown.run_start
    numbers = range(math.ceil(first / gap), math.floor((first + shown.seconds) / gap) + 1)
    moments = [number * gap for number in numbers]
    names = [duration(moment) if gap >= 1 else f"{moment:.7g} s" for moment in moments]
    return [(shown.units(shown.run_start + moment), name) for moment, name in zip(moments, names, strict=True)]


def duration(seconds: float) -> str:
    """As people say it. Example: duration(200) == "3 min 20 s"."""
    if 0 < seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def thinned(found: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Steps of round numbers, as many as have room for a label."""
    gap = next(gap for gap in _round_gaps() if gap >= 1 and len(found) / gap <= STEP_LABELS)
    return [(step, x) for step, x in found if step % gap == 0]


def _rows(spans: Sequence[Span], shown: Window) -> list[list[Piece]]:
    """A process's pieces, stage by stage, in as few rows as hold them; of waiting only what no work covers."""
    start, end = shown.start, shown.end
    rows: list[list[Piece]] = [[]]
    for stage in STAGES:
        own = spans if stage == "wait" else [span for span in spans if stage_of(span) == stage]
        pieces = [piece for piece in flatten(own, start=start, end=end) if stage_of(piece.span) == stage]
        row = next((row for row in rows if not _collide(pieces, row, shown)), None)
        if row is None:
            row = []
            rows.append(row)
        row.extend(pieces)
        row.sort(key=lambda piece: piece.start)
    return rows


def _collide(pieces: Sequence[Piece], row: Sequence[Piece], shown: Window) -> bool:
    """Whether they overlap for long enough to be seen: what two threads call the same moment differs a little."""
    return sum(overlaps(pieces, row)) > shown.seconds * SEEN


def _mark(blob: Sequence[Piece], shown: Window) -> Mark:
    longest = max(blob, key=lambda piece: piece.seconds).span
    return Mark(
        x=shown.units(blob[0].start),
        width=UNITS * sum(piece.seconds for piece in blob) / shown.seconds,
        stage=stage_of(longest),
        label=_label(longest) if len(blob) == 1 else f"{len(blob)} spans",
    )


def _label(span: Span) -> str:
    """Example: "pause, version 7"."""
    stage, _, part = span.name.partition(":")
    name = part if stage == stage_of(span) else span.name
    numbers = {"step": span.step, "chunk": span.chunk, "version": span.version, "worker": span.worker}
    return ", ".join(
        filter(None, [name, *(f"{key} {number}" for key, number in numbers.items() if number is not None)])
    )


def _round_gaps() -> Iterator[float]:
    """0.001, 0.002, 0.005, … below a minute; then what clocks are divided by; then hours."""
    for power in range(-3, 1):
        yield from (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
    yield from (10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    hours = 7200.0
    while True:
        yield hours
        hours *= 2
