"""The calls about what a run says: events, metrics, logs, samples; and how a run is followed while it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from potstill.client.answers import Refused, as_bytes, as_object, as_text, ask, path, refusal
from potstill.client.following import FOLLOWING, enduring, is_away
from potstill.client.patience import unreachable
from potstill.client.resources import FINAL, Event, Metrics, Page, Samples
from potstill.client.runs import POLL_S, get_run
from potstill.client.steps import Call, Flow, Give, Hear, Listen, Lost, Message, Parameter, Pause, Reply, Step
from potstill.errors import ServiceError

STREAM = "text/event-stream"
SILENCE_S = 45.0  # three of the service's keep-alives
_NO_STREAM = frozenset({406, 429})  # of these it has too many, or none for this client

R = TypeVar("R")
Told: TypeAlias = Generator[Step | Listen | Hear | Give[Event], Any, R]


def list_events(
    run_id: str, *, after: int = 0, limit: int = 100, level: str | None = None, type: str | None = None
) -> Call[Page[Event]]:
    """A page of events with seq > after; with `level` or `type`, of those that have just this one."""
    params = {"after": after, "limit": limit, "level": level, "type": type}
    return Call(method="GET", path=path("v1", "runs", run_id, "events"), params=params, reads=as_object)


def events(run_id: str, *, after: int = 0, level: str | None = None, type: str | None = None) -> Flow[Event]:
    """Every event with seq > after, as it happens, until the run ends; each exactly once and in order.

    A broken stream is resumed behind the last event; where no stream can be had, pages are read instead. Raises
    Refused, and ServiceError (unreachable) when the service stays away for a minute or two.
    """

    def wanted(event: Event) -> bool:
        return level in {None, event["level"]} and type in {None, event["type"]}

    reader, failures = _Reader(run_id, after, wanted), 0
    while True:
        try:
            pause_s = yield from reader.listen()
            failures = 0
        except ServiceError as error:
            failures += 1
            if failures == FOLLOWING.tries or not is_away(error):
                raise
            pause_s = FOLLOWING.pause(failures)
        if pause_s is None:
            return
        yield Pause(pause_s)


@dataclass(slots=True)
class _Reader:
    """Where a follower is: behind the event `after`, which stays true however a connection ends."""

    run_id: str
    after: int
    wanted: Callable[[Event], bool]

    def listen(self) -> Told[float | None]:
        """One connection. Returns for how long to wait before the next, None at the run's end. Raises ServiceError."""
        outcome: Reply | Lost = yield Listen(_stream(self.run_id, self.after))
        if isinstance(outcome, Lost):
            raise unreachable(outcome)
        if _is_stream(outcome):
            ended = yield from self._hear()
            if not ended:
                return FOLLOWING.pause(1)
        elif not outcome.good and outcome.status not in _NO_STREAM:
            raise refusal(outcome)
        ended = yield from self._read_on()  # after a stream too: one that was too slow has not told everything
        return None if ended else POLL_S

    def _hear(self) -> Told[bool]:
        """What a stream tells. Returns whether it told the run's end."""
        while isinstance(message := (yield Hear()), Message):
            if message.event == "end":
                return True
            if message.event == "run.event":  # a newer service may say more between events
                event: Event = json.loads(message.data)
                yield from self._tell(event)
        return False

    def _read_on(self) -> Told[bool]:
        """What is there by now, in pages. Returns whether the run is at its end."""
        run = yield from ask(get_run(self.run_id))  # before the events: those of a run at its end are all there
        more = True
        while more:
            page = yield from ask(list_events(self.run_id, after=self.after, limit=1000))
            for event in page["data"]:
                yield from self._tell(event)
            more = page["has_more"]
        return run["status"] in FINAL

    def _tell(self, event: Event) -> Told[None]:
        if event["seq"] > self.after:
            self.after = event["seq"]
            if self.wanted(event):
                yield Give(event)


def _stream(run_id: str, after: int) -> Call[None]:
    headers = {"Accept": STREAM, "Cache-Control": "no-store", "Last-Event-ID": str(after)}
    return Call(
        method="GET",
        path=path("v1", "runs", run_id, "events"),
        headers=headers,
        reads=lambda _reply: None,
        timeout_s=SILENCE_S,
    )


def _is_stream(reply: Reply) -> bool:
    return reply.good and reply.headers.get("content-type", "").partition(";")[0].strip() == STREAM


def get_metrics(
    run_id: str, *, keys: Sequence[str] = (), after_step: int | None = None, max_points: int | None = None
) -> Call[Metrics]:
    """A run's numbers by step. `keys`: which, by default all; of more than `max_points` steps the service thins out."""
    return Call(
        method="GET",
        path=path("v1", "runs", run_id, "metrics"),
        params={"keys": ",".join(keys) or None, "after_step": after_step, "max_points": max_points},
        reads=as_object,
    )


def export_metrics(
    run_id: str, *, format: Literal["csv", "parquet"], keys: Sequence[str] = (), max_points: int | None = None
) -> Call[bytes]:
    """The same as a file's content."""
    return Call(
        method="GET",
        path=path("v1", "runs", run_id, "metrics"),
        params={"format": format, "keys": ",".join(keys) or None, "max_points": max_points},
        reads=as_bytes,
    )


def list_samples(run_id: str, *, step: int | None = None, limit: int = 20, after: str | None = None) -> Call[Samples]:
    """Completions as they were scored, newest first; what only a teacher read needs the scope samples:privileged."""
    params = {"step": step, "limit": limit, "after": after}
    return Call(method="GET", path=path("v1", "runs", run_id, "samples"), params=params, reads=as_object)


def get_logs(
    run_id: str, *, role: str | None = None, rank: int | None = None, tail: int | None = None, offset: int | None = None
) -> Call[str]:
    """What one of a run's processes wrote. `tail`: the last lines only; `offset`: from this byte on."""
    return _log(run_id, {"role": role, "rank": rank, "tail": tail, "offset": offset}, as_text)


def follow_logs(run_id: str, *, role: str | None = None, rank: int | None = None, tail: int | None = None) -> Flow[str]:
    """The same as it grows, until the run ends. A log that is not there yet is waited for."""
    offset: int | None = None
    while True:
        run = yield from enduring(get_run(run_id))
        params = {"role": role, "rank": rank, "tail": tail if offset is None else None, "offset": offset}
        try:
            text, offset = yield from enduring(_log(run_id, params, _piece))
        except Refused as refused:
            if refused.status != 404 or offset is not None or run["status"] in FINAL:
                raise
            text = ""
        if text:
            yield Give(text)
        elif run["status"] in FINAL:
            return
        yield Pause(POLL_S)


def _log(run_id: str, params: Mapping[str, Parameter], reads: Callable[[Reply], R]) -> Call[R]:
    return Call(method="GET", path=path("v1", "runs", run_id, "logs"), params=params, reads=reads)


def _piece(reply: Reply) -> tuple[str, int]:
    """Some text of a log, and where it goes on."""
    return as_text(reply), int(reply.headers["x-next-offset"])
