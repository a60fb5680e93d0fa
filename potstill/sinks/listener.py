"""What of a run's journal its sinks are told, and how the run is told of its sinks' troubles.

    metrics                         Step: every finite number of the line, by its name in metrics.jsonl
    eval.finished, validation…      Step: held_out_accuracy, held_out_loss
    run.resumed, run.started        Rewind, where later steps had been told
    events of level warn, error     Note, but for what sinks say of themselves
    run.finished, status            Ending

A listener of the journal: it takes microseconds and does not raise. Records are read forgivingly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from potstill.errors import RunError
from potstill.journal import Journal, Status
from potstill.metrics import number
from potstill.sinks.feed import Feed
from potstill.sinks.sink import Ending, Note, Record, Rewind, Step

OWN = "sink."  # begins the types of events about sinks
TOLD_LEVELS = {"warn", "error"}
_NO_METRICS = {"seq", "time", "step"}


class Listener:
    """Feeds every sink with what the journal says. Called by the one thread that writes the journal."""

    def __init__(self, journal: Journal, feeds: Sequence[Feed]) -> None:
        self._journal = journal
        self._feeds = feeds
        self._step = 0
        self._rewinds = journal.num_steps > 0
        self._status: str = Status.STARTING
        self._headline: Mapping[str, float] = {}

    def __call__(self, stream: str, record: Mapping[str, Any]) -> None:
        for told in self._records(stream, record):
            for feed in self._feeds:
                feed.put(told)
        self._tell()

    def close(self, timeout_s: float) -> None:
        """Let all sinks take what is left, for `timeout_s` together, and say in one event each what they did not."""
        deadline = time.monotonic() + timeout_s
        ending = Ending(status=self._status, step=self._step, time=time.time(), headline=self._headline)
        try:
            for feed in self._feeds:
                feed.end(ending)
            for feed in self._feeds:
                feed.join(deadline)
        finally:  # a second Ctrl-C
            for feed in self._feeds:
                feed.abandon()
        self._tell()
        for feed in self._feeds:
            if feed.lost:
                message = f"sink {feed.name} does not have {feed.lost} records of this run; its folder has them all"
                self._event("sink.dropped", message, sink=feed.name, records=feed.lost)

    def _records(self, stream: str, record: Mapping[str, Any]) -> Iterator[Record]:
        if stream == "metrics":
            self._step, self._rewinds = int(number(record, "step") or 0), True
            yield Step(step=self._step, time=record["time"], values=numbers(record))
        elif stream == "status":
            self._status = str(record["status"])
        elif not record["type"].startswith(OWN):
            yield from self._of_event(record)

    def _of_event(self, event: Mapping[str, Any]) -> Iterator[Record]:
        data, when = event.get("data") or {}, event["time"]
        found = held_out(event["type"], data)
        if found:
            yield Step(step=int(number(data, "step") or 0), time=when, values=found)
        elif event["type"] == "run.finished":
            self._headline = numbers(data)
        elif event["type"] in {"run.resumed", "run.started"} and self._rewinds:
            self._step = int(number(data, "step") or 0)
            yield Rewind(step=self._step, time=when)
        if event["level"] in TOLD_LEVELS:
            yield Note(step=self._step, time=when, level=event["level"], type=event["type"], message=event["message"])

    def _tell(self) -> None:
        for feed in self._feeds:
            for cause in feed.troubles():
                message = f"sink {feed.name}: {cause}; the run goes on without it"
                self._event("sink.failed", message, sink=feed.name, cause=cause)

    def _event(self, type: str, message: str, **data: Any) -> None:
        with contextlib.suppress(RunError):  # the disk refuses: the run's own next record says so
            self._journal.event(type, message, level="warn", **data)


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What was measured.

    >>> numbers({"seq": 7, "time": 1.5, "step": 3, "loss": 0.25, "accuracy": None, "note": "text"})
    {'loss': 0.25}
    """
    found = {name: number(record, name) for name in record if name not in _NO_METRICS}
    return {name: value for name, value in found.items() if value is not None}


def held_out(type: str, data: Mapping[str, Any]) -> dict[str, float]:
    """The curve that an event is a point of; empty for any other event."""
    if type == "eval.finished":
        name = "held_out_accuracy_teacher" if data.get("stage") == "teacher" else "held_out_accuracy"
        return {name: value} if (value := number(data, "accuracy")) is not None else {}
    if type == "validation.finished":
        return {"held_out_loss": value} if (value := number(data, "loss")) is not None else {}
    return {}
