"""What every teacher that scores can be asked, wherever it lives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from potstill.types import TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem


class Scorer(Protocol):
    """A teacher server, somebody's endpoint, or several of them as one. Lives in one event loop."""

    async def capabilities(self) -> Capabilities:
        """Who it is and what it offers. Asked of the other side once, then remembered. Raises TeacherError."""

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        """Scores in the order of `items`, checked by potstill/alignment.py; with `expect`, only from that teacher.

        Raises TeacherRefused for what it cannot be asked, TeacherUnavailable when it is away until the deadline,
        AlignmentError for an answer that does not belong to the question.
        """

    async def aclose(self) -> None:
        """Close its connections."""
