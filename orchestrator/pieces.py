"""Overlapping spans become pieces, one after another: at every instant the foremost of what is open then.

    generate  ████████████████░░░░░░░░██████████          generate
    score     ░░░░░░░░████████████████░░░░░░░░░░    ──►   generate, score, generate
    wait      ██████████████████████████████████

What keeps a processor busy is before what runs beside it, and any work is before a wait. Pure: it reads no file.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from potstill.spans import Span

STAGES = ("generate", "score", "train", "weights", "evaluate", "checkpoint", "other", "wait")
FOREMOST = (
    "train", "weights:pause", "generate", "evaluate", "score", "weights", "checkpoint", "other", "wait:batch", "wait"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of one process in which `span` is the foremost."""

    start: float
    end: float
    span: Span

    @property
    def seconds(self) -> float:
        return self.end - self.start


def stage_of(span: Span) -> str:
    """What is before the colon, or "other" for a name that this page has no colour for."""
    stage = span.name.partition(":")[0]
    return stage if stage in STAGES else "other"


def role_of(process: str) -> str:
    """ "worker-3" is a "worker"."""
    return re.sub(r"-\d+$", "", process)


def number_of(process: str) -> int | None:
    """ "worker-3" is number 3; the loop has none."""
    found = re.search(r"-(\d+)$", process)
    return int(found[1]) if found else None


def group(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """By process: the loop, the learner's ranks, the rollout workers by number, then the others."""
    found: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        found[span.process].append(span)
    first = {"loop": 0, "learner": 1, "worker": 2}

    def place(process: str) -> tuple[int, str, int]:
        return first.get(role_of(process), len(first)), role_of(process), number_of(process) or 0

    return {process: found[process] for process in sorted(found, key=place)}


def clip(spans: Iterable[Span], *, start: float, end: float) -> list[Span]:
    """The spans that reach into the window, whole."""
    return [span for span in spans if span.end > start and span.start < end]


def flatten(spans: Sequence[Span], *, start: float, end: float) -> list[Piece]:
    """Pieces of [start, end] in order, without overlap: at every instant the foremost of the spans open then.

    Of one stage, the span that began first goes on until it ends.
    """
    coming = sorted(clip(spans, start=start, end=end), key=lambda span: span.start, reverse=True)
    edges = sorted({min(max(edge, start), end) for span in coming for edge in (span.start, span.end)})
    waiting: list[tuple[int, float, int, Span]] = []  # by how far ahead, then by age; the number breaks ties
    pieces: list[Piece] = []
    for left, right in itertools.pairwise(edges):
        while coming and coming[-1].start <= left:
            span = coming.pop()
            heapq.heappush(waiting, (_rank(span), span.start, len(coming), span))
        while waiting and waiting[0][-1].end <= left:
            heapq.heappop(waiting)
        if not waiting:
            continue
        foremost = waiting[0][-1]
        if pieces and pieces[-1].span is foremost and pieces[-1].end == left:
            left = pieces.pop().start
        pieces.append(Piece(start=left, end=right, span=foremost))
    return pieces


def overlaps(ours: Sequence[Piece], theirs: Sequence[Piece]) -> Iterator[float]:
    """The seconds of each overlap between two processions of pieces."""
    one, other = 0, 0
    while one < len(ours) and other < len(theirs):
        left, right = ours[one], theirs[other]
        if left.start < right.end and right.start < left.end:
            yield min(left.end, right.end) - max(left.start, right.start)
        if left.end <= right.end:
            one += 1
        else:
            other += 1


def _rank(span: Span) -> int:
    return FOREMOST.index(span.name if span.name in FOREMOST else stage_of(span))
