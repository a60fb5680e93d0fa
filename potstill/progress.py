"""How far a run and its phases have come, folded from journal records. It shows nothing and knows no terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from potstill.metrics import number

CURVES = ("reverse_kl", "loss", "accuracy")
NOTED = {"checkpoint.saved", "run.finished", "run.failed"}  # events worth a line whatever their level


class State(StrEnum):
    """Of a phase; the value is its mark in the panel."""

    WAITING = "○"
    ACTIVE = "●"
    DONE = "✓"
    FAILED = "×"


@dataclass(slots=True, kw_only=True)
class Phase:
    """One stretch of work with steps of its own, e.g. "distilling"."""

    name: str
    total_steps: int | None
    state: State = State.WAITING
    started: float | None = None
    ended: float | None = None
    latest: Mapping[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})
    held_out: list[float] = field(default_factory=list)
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=20))  # of steps, on the display's clock

    @property
    def step(self) -> int:
        step = number(self.latest, "step")
        return 0 if step is None else int(step)  # before the first step, none is done

    @property
    def objective(self) -> str:
        """The name of the curve to show: the reverse KL, or the loss where no reverse KL is measured."""
        return "loss" if self.curves["loss"] and not self.curves["reverse_kl"] else "reverse_kl"

    def seconds(self, now: float) -> float | None:
        return None if self.started is None else (self.ended or now) - self.started

    def eta_s(self, now: float) -> float | None:
        """Seconds left at the pace of the last steps; None until two have been seen, and after the last."""
        if self.total_steps is None or self.step >= self.total_steps or len(self.arrivals) < 2:
            return None
        pace_s = (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1)
        left_s = (self.total_steps - self.step) * pace_s - (now - self.arrivals[-1])
        return max(0.0, left_s)


class Progress:
    """What is known of a run, folded from its records. Knows no terminal."""

    def __init__(self, total_steps: int | None, phases: Mapping[str, int | None]) -> None:
        self.named = bool(phases)
        self.phases = [Phase(name=name, total_steps=total) for name, total in phases.items()]
        if not self.named:
            self.phases.append(Phase(name="training", total_steps=total_steps))
        self.active: Phase | None = None
        self.notice = ""

    @property
    def shown(self) -> Phase:
        """The phase whose numbers are of interest: the active one, else the last that began."""
        begun = [phase for phase in self.phases if phase.started is not None]
        return self.active or max(begun, key=lambda phase: phase.started or 0.0, default=self.phases[0])

    def begin(self, name: str, total_steps: int | None, now: float) -> Phase:
        """Make `name` the active phase; the one before it is done. Beginning the active phase again changes nothing."""
        if self.active is not None and self.active.name == name:
            return self.active
        phase = next((phase for phase in self.phases if phase.name == name), None)
        if phase is None:
            phase = Phase(name=name, total_steps=total_steps)
            self.phases.append(phase)
        self.end(State.DONE, now)
        phase.total_steps = phase.total_steps if total_steps is None else total_steps
        phase.state, phase.started, self.active = State.ACTIVE, now, phase
        return phase

    def end(self, state: State, now: float) -> None:
        if self.active is not None:
            self.active.state, self.active.ended, self.active = state, now, None

    def take_metrics(self, record: Mapping[str, Any], now: float) -> None:
        phase = self._current(now)
        phase.latest = record
        phase.arrivals.append(now)
        for name, curve in phase.curves.items():
            value = number(record, name)
            if value is not None:
                curve.append(value)

    def take_event(self, record: Mapping[str, Any], now: float) -> None:
        data = record.get("data") or {}
        kind = record.get("type")
        if kind == "phase.started":
            self._phase_started(printable(data.get("phase")), number(data, "total_steps"), now)
        elif kind == "eval.finished":
            accuracy = number(data, "accuracy")
            if accuracy is not None and data.get("stage") != "teacher":
                self._current(now).held_out.append(accuracy)
        elif kind == "run.failed":
            self.end(State.FAILED, now)
        if record.get("level") in {"warn", "error"} or kind in NOTED:
            self.notice = printable(record.get("message"))

    def _phase_started(self, name: str, total_steps: float | None, now: float) -> None:
        """A name given in advance begins that phase; any other says what goes on inside the active one."""
        if any(phase.name == name for phase in self.phases):
            self.begin(name, None if total_steps is None else int(total_steps), now)
        elif self.named:
            self.notice = name
        else:
            self._current(now).name = name

    def _current(self, now: float) -> Phase:
        if self.active is not None:
            return self.active
        waiting = (phase.name for phase in self.phases if phase.state is State.WAITING)
        return self.begin(next(waiting, "running"), None, now)


def printable(text: object) -> str:
    """One line without control characters, so that no record can steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in str(text or ""))
