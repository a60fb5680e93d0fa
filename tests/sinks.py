"""Sinks that go well or badly: small real objects for the tests of what surrounds them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import SinkError
from potstill.journal import Journal, Status
from potstill.sinks.opening import Ready, told
from potstill.sinks.sink import Ending, Facts, Note, Rewind, SinkLost, Step

CLOSE_S = 1.0
CANARY = "canary-7d1f-secret"
"""A secret that may be found nowhere."""


def facts_of(folder: Path, *, resumed: bool = False) -> Facts:
    folder.mkdir(parents=True, exist_ok=True)
    return Facts(name="told", folder=folder, config={"optim": {"lr": 0.1}}, resumed=resumed)


def step(number: int, **values: float) -> Step:
    return Step(step=number, time=1000.0 + number, values=values)


def ending(status: str = "succeeded", **headline: float) -> Ending:
    return Ending(status=status, step=3, time=1003.0, headline=headline)


@dataclass
class Recording:
    """Takes everything and keeps it, in its order. Subclasses say what goes wrong."""

    taken: list[Any] = field(default_factory=list)
    opened: list[Facts] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def open(self, facts: Facts) -> None:
        self.opened.append(facts)

    def step(self, step: Step) -> None:
        self.taken.append(step)

    def note(self, note: Note) -> None:
        self.taken.append(note)

    def rewind(self, rewind: Rewind) -> None:
        self.taken.append(rewind)

    def finish(self, ending: Ending) -> None:
        self.taken.append(ending)
        self.ended.set()

    @property
    def steps(self) -> list[int]:
        return [record.step for record in self.taken if isinstance(record, Step)]


class Refusing(Recording):
    """Never takes a step, and names another address in each refusal."""

    def step(self, step: Step) -> None:
        raise SinkError(f"no connection from port {40000 + step.step} (object at 0x{step.step:x})")


class Losing(Recording):
    """Is lost at the first step, then works."""

    def step(self, step: Step) -> None:
        if len(self.opened) == 1:
            raise SinkLost("the other side has gone away")
        super().step(step)


class Closed(Recording):
    """Cannot be opened."""

    def open(self, facts: Facts) -> None:
        raise SinkError("the key is not known here")


class Broken(Recording):
    """Has a mistake in it."""

    def step(self, step: Step) -> None:
        raise KeyError("no such table")


@dataclass
class Hanging(Recording):
    """Waits for something that never comes, until somebody ends it."""

    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def step(self, step: Step) -> None:
        self.reached.set()
        self.released.wait()


@dataclass
class Slow(Recording):
    """Takes its time over every step."""

    seconds: float = 0.02

    def step(self, step: Step) -> None:
        time.sleep(self.seconds)
        super().step(step)


def make_config(runs: Path, **sinks: Any) -> RunConfig:
    """A config that is never run."""
    return parse(
        {
            "name": "told",
            "runs": str(runs),
            "method": "opd",
            "student": {"model": "models/student"},
            "teacher": {"kind": "server", "model": "models/teacher"},
            "data": {"kind": "jsonl", "path": "sums.jsonl"},
            "rollout": {"prompts_per_step": 2, "sampling": {"max_new_tokens": 12}},
            "optim": {"lr": 1e-3},
            "loop": {"steps": 3},
            "sinks": {"close_s": CLOSE_S, **sinks},
        }
    )


def tell(
    folder: Path, sink: Recording | list[Ready], work: Callable[[Journal], None], *, resume: bool = False, **sinks: Any
) -> Path:
    """The folder of a journal in which `work` wrote, while a sink, or several that are ready, were told."""
    config = make_config(folder, **sinks)
    journal = Journal(folder / "told", resume=resume)
    listed = sink if isinstance(sink, list) else [Ready(name="some", sink=sink, abandon=lambda: None)]
    with told(listed, config, journal, resumed=resume):
        work(journal)
    journal.close()
    return journal.folder


def three_steps(journal: Journal) -> None:
    journal.status(Status.RUNNING)
    for number in (1, 2, 3):
        journal.metrics(number, {"loss": 1 / number})
    journal.event("run.finished", "the run is complete", student_after=0.5, student_before=math.nan)
    journal.status(Status.SUCCEEDED)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def running(pid: int) -> bool:
    """Whether it works; a process that nobody has waited for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
