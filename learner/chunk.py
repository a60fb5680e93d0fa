"""A few rows of the step as a loss sees them: the student's logits, with gradient, and whom they are compared with.

Terms share a chunk, so that softmax and teacher's logits are taken once. It lives as long as its rows do.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from learner.facts import Facts, Logits, known


class Chunk:
    """Rows of the step. Legend: C rows, V vocabulary."""

    def __init__(self, logits: Tensor, rows: Tensor, facts: Facts) -> None:
        self.logits = logits  # [C, V] float32, with gradient
        self.rows = rows  # [C] i64, which rows of `facts` these are
        self._facts = facts
        self._others: dict[str, Tensor] = {}
        self.compared: dict[str, tuple[Tensor, Tensor]] = {}  # by term (outcomes.py)

    @cached_property
    def logq(self) -> Tensor:
        """[C, V] the student's log-probs."""
        return self.logits.log_softmax(-1)

    @cached_property
    def written(self) -> Tensor:
        """[C] the student's log-probs of the written tokens."""
        return self.logq.gather(-1, self._facts.token_ids[self.rows, None]).squeeze(-1)

    def has_logits(self, whose: str) -> bool:
        """Whether the logits of the "teacher" or the "reference" are inside the learner."""
        return getattr(self._facts, f"{whose}_logits") is not None

    def other_logits(self, whose: str) -> Tensor:
        """[C, V] of the "teacher" or the "reference". Raises ValueError when they are not inside the learner."""
        if whose not in self._others:
            logits: Logits | None = getattr(self._facts, f"{whose}_logits")
            if logits is None:
                raise ValueError(f"the objective reads facts.{whose}_logits, which is missing")
            self._others[whose] = logits(self.rows)
        return self._others[whose]

    def fact(self, name: str) -> Tensor:
        """The rows of a field of the facts. Raises ValueError when it is missing."""
        return known(getattr(self._facts, name), name)[self.rows]

    def known(self, name: str) -> Tensor | None:
        """The rows of a field of the facts; None when it is missing."""
        field: Tensor | None = getattr(self._facts, name)
        return None if field is None else field[self.rows]

    def scored_by(self) -> dict[str, Tensor]:
        """[C] which rows each teacher outside the learner has scored, by its name; only those that scored some."""
        names = self._facts.teachers or ()
        rows = self._facts.sequence[self.rows]
        found = {
            name: torch.tensor([one == name for one in names], device=rows.device)[rows] for name in set(names) - {""}
        }
        return {name: scored for name, scored in found.items() if bool(scored.any())}

    def where(self, kept: Tensor) -> Chunk:
        """The rows for which `kept` [C] is true; itself when that is all of them."""
        return self if bool(kept.all()) else Chunk(self.logits[kept], self.rows[kept], self._facts)


class ReadAhead:
    """Logits of another model for losses that take a few rows at a time, in order, where a product wants many.

    A window of rows is computed at once and kept until rows of another are wanted. What is given is part of it: not to
    be written to.
    """

    def __init__(self, logits: Logits, *, num_rows: int, window: int) -> None:
        self._logits = logits
        self._num_rows = num_rows  # there are, of which the last window may hold fewer
        self._window = window
        self._start = 0
        self._kept: Tensor | None = None  # [window, V], of the rows from _start on

    def __call__(self, rows: Tensor) -> Tensor:
        """[C, V] of the rows [C], ascending."""
        first, last = int(rows[0]), int(rows[-1])
        start = first - first % self._window
        if last >= start + self._window:  # no window holds them all
            return self._logits(rows)
        if self._kept is None or start != self._start:
            self._kept = None  # one window at a time
            stop = min(start + self._window, self._num_rows)
            self._kept, self._start = self._logits(torch.arange(start, stop, device=rows.device)), start
        without_gaps = last - first + 1 == len(rows)
        return self._kept[first - start : last - start + 1] if without_gaps else self._kept[rows - start]
