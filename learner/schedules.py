"""Numbers of an objective that learn from the loss: what they are at this step, and how they move after it. Pure.

A number that depends on the step alone is a Ramp (potstill/section.py) and needs no state; those here do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from potstill.algebra.objective import Objective
from potstill.algebra.targets import Taid
from potstill.errors import ConfigError


class Schedules:
    """One for every term whose target is TAID. Example: values() is {"main": 0.4} before the first step."""

    def __init__(self, objective: Objective, steps: int) -> None:
        self._steps = steps
        self._targets = {name: term.target for name, term in objective.terms.items() if isinstance(term.target, Taid)}
        self._progress = {name: Progress(t=target.start) for name, target in self._targets.items()}

    def values(self) -> dict[str, float]:
        """TAID's t by term, for the step that comes next."""
        return {name: progress.t for name, progress in self._progress.items()}

    def observe(self, step: int, losses: Mapping[str, float]) -> None:
        """After optimizer step `step`, counted from 1: each term's loss over the whole step, all ranks together.

        A term that no row of the step counted for has no loss: it says nothing, and its schedule waits.
        """
        for name, target in self._targets.items():
            if name in losses:
                self._progress[name] = advance(target, self._progress[name], losses[name], done=step / self._steps)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as plain JSON, which gives floats back bit for bit."""
        return {name: dataclasses.asdict(progress) for name, progress in self._progress.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave. Raises ConfigError when it is of an objective with other terms."""
        if state.keys() != self._progress.keys():
            raise ConfigError(
                f"the checkpoint has schedules for {sorted(state)}, the objective for {sorted(self._progress)}; "
                "continue with the objective that wrote it"
            )
        self._progress = {name: Progress(**state[name]) for name in self._progress}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far TAID has come."""

    t: float  # the teacher's part of the target
    momentum: float = 0.0  # of the loss's relative fall
    previous: float | None = None  # loss of the step before


def advance(target: Taid, progress: Progress, loss: float, *, done: float) -> Progress:
    """t after a step (TAID, arXiv 2501.16937, §3.2 and algorithm 1); `done` ∈ (0, 1] is the part of the run behind it.

        δ = (J' − J) / (J' + 1e-15)        relative fall of the loss J since the one before, J'
        m ← βm + (1 − β)δ
        t ← min(end, max(start + (end − start)·done, t + α σ(m)(1 − t)))

    The first loss is only remembered. J is the term's own loss: a KL where the term's loss is one, as in the paper; the
    official code compares cross entropies, which also hold the target's entropy. With start = 0 the first target is the
    student and J' is 0: any rise is then infinite, m stays far below 0 for thousands of steps, and t on the line.

    >>> round(advance(Taid(rate=0.1), Progress(t=0.4, previous=2.0), 2.0, done=0.01).t, 6)  # 0.4 + 0.1 · σ(0) · 0.6
    0.43
    """
    if progress.previous is None:
        return dataclasses.replace(progress, previous=loss)
    fall = (progress.previous - loss) / (progress.previous + 1e-15)
    momentum = target.momentum * progress.momentum + (1 - target.momentum) * fall
    rise = target.rate * _sigmoid(momentum) * (1 - progress.t)
    line = target.start + (target.end - target.start) * done
    return Progress(t=min(target.end, max(line, progress.t + rise)), momentum=momentum, previous=loss)


def _sigmoid(x: float) -> float:
    """1 / (1 + e^−x), without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))
