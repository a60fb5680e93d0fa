"""The calls about what a run says: events, metrics, logs, samples; and how a run is followed while it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

from potstill.client.answers import as_bytes, as_object, as_text, ask, path, read, refusal
from potstill.client.patience import Patience, unreachable
from potstill.client.resources import FINAL, Event, Metrics, Page, Samples
from potstill.client.runs import POLL_S, get_run
from potstill.client.steps import Ask, Call, Flow, Give, Hear, Listen, Lost, Message, Pause, Reply, Step

STREAM = "text/event-stream"
SILENCE_S = 45.0  # three of the service's keep-alives
FOLLOWING = Patience(tries=15, first_s=0.25, longest_s=10.0)  # a service that restarts is back within two minutes
_NO_STREAM = frozenset({406, 429, 503})

Followed = Generator[Step | Listen | Hear | Give[Event], Any, tuple[bool, int]]


def list_events(
    run_id: str, *, after: int = 0, limit: int = 100, level: str | None = None, type: str | None = None
) -> Call[Page[Event]]:
    """A page of events with seq > after; with `level` or `type`, of those that have just this one."""
    params = {"after": after, "limit": limit, "level": level, "type": type}
    return Call(method="GET", path=path("v1", "runs", run_id, "events"), params=params, reads=as_object)


def events(run_id: str, *, after: int = 0, level: str | None = None, type: str | None = None) -> Flow[Event]:
    """Every event with seq > after, as it happens, until the run ends; each exactly once and in order.

    A broken stream is resumed behind the last event; where no stream can be had, pages are read instead. Raises
    Refused, and ServiceError (unreachable) when the service stays away for about two minutes.
    """

    def wanted(event: Event) -> bool:
        return level in {None, event["level"]} and type in {None, event["type"]}

    failures, ended = 0, False
    while not ended:
        pause_s = POLL_S
        outcome: Reply | Lost = yield Listen(_stream(run_id, after))
        if isinstance(outcome, Lost):
            failures += 1
            if failures == FOLLOWING.tries:
                raise unreachable(outcome)
            pause_s = FOLLOWING.pause(failures)
        elif _is_stream(outcome):
            failures, pause_s = 0, FOLLOWING.pause(1)
            ended, after = yield from _hear(after, wanted)
            if ended:  # a follower that was too slow may have missed the last ones
                ended, after = yield from _read_on(run_id, after, wanted)
        elif outcome.good or outcome.status in _NO_STREAM:
            failures = 0
            ended, after = yield from _read_on(run_id, after, wanted)
        else:
            raise refusal(outcome)
        if not ended:
            yield Pause(pause_s)


def _hear(after: int, wanted: Callable[[Event], bool]) -> Followed:
    """What one connection tells. Returns whether it told the run's end, and the last event's number."""
    while isinstance(message := (yield Hear()), Message):
        if message.event == "end":
            return True, after
        event = _event_in(message)
        if event is not None and event["seq"] > after:
            after = event["seq"]
            if wanted(event):
                yield Give(event)
    return False, after


def _read_on(run_id: str, after: int, wanted: Callable[[Event], bool]) -> Followed:
    """What is there by now, in pages. Returns the same."""
    run = yield from ask(get_run(run_id))  # before the events: those of a run at its end are all there
    more = True
    while more:
        page = yield from ask(list_events(run_id, after=after, limit=1000))
        for event in page["data"]:
            after = event["seq"]
            if wanted(event):
                yield Give(event)
        more = page["has_more"]
    return run["status"] in FINAL, after


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


def _event_in(message: Message) -> Event | None:
    """None for what a newer service may say between events."""
    if message.event != "run.event":
        return None
    event: Event = json.loads(message.data)
    return event


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
    params = {"role": role, "rank": rank, "tail": tail, "offset": offset}
    return Call(method="GET", path=path("v1", "runs", run_id, "logs"), params=params, reads=as_text)


def follow_logs(run_id: str, *, role: str | None = None, rank: int | None = None, tail: int | None = None) -> Flow[str]:
    """The same as it grows, until the run ends. A log that is not there yet is waited for."""
    offset: int | None = None
    while True:
        run = yield from ask(get_run(run_id))
        wanted = get_logs(run_id, role=role, rank=rank, tail=tail if offset is None else None, offset=offset)
        reply: Reply = yield Ask(wanted)
        if reply.status == 404 and offset is None and run["status"] not in FINAL:
            yield Pause(POLL_S)
            continue
        text = read(wanted, reply)
        offset = int(reply.headers["x-next-offset"])
        if text:
            yield Give(text)
        elif run["status"] in FINAL:
            return
        yield Pause(POLL_S)
