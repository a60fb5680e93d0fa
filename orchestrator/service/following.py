"""Whoever follows a run's events: one reader of the database for each followed run, however many follow it.

A follower replays from the database up to where the shared reader is, and hears from it what comes after. Events are
made into bytes once. A follower that does not keep up is let go of: it resumes behind the last event that it has.
Refuses more followers of one key than its limits allow (429).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from orchestrator.service.principals import Principal
from orchestrator.service.runs import Event, State, event_resource
from orchestrator.service.store import Store
from orchestrator.service.store.events import FEW
from orchestrator.service.waits import briefly
from potstill.errors import ServiceError

RETRY_MS = 3000  # after which a client whose stream broke comes again
KEEPALIVE_S = 15.0  # without an event, after which followers hear a comment, so that they know that the line lives
BEHIND = 64  # batches that may wait for a follower

Batch = tuple[int, bytes]  # the last event's number, and all of them as they are sent


@dataclass(eq=False)
class _Tail:
    """The shared reader of one run."""

    seq: int  # everything up to here has been handed out
    queues: set[asyncio.Queue[Batch | None]] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    ended: State | None = None  # how the run ended, once all of its events have been handed out


class Following:
    """Of one process. Used within its event loop only."""

    def __init__(self, store: Store, *, poll_s: float, keepalive_s: float = KEEPALIVE_S) -> None:
        self._store = store
        self._poll_s = poll_s
        self._keepalive_s = keepalive_s
        self._tails: dict[str, _Tail] = {}
        self._open: Counter[str] = Counter()
        self._over = False

    @property
    def followers(self) -> int:
        return sum(self._open.values())

    def admit(self, who: Principal) -> None:
        """Raises ServiceError (429) when the key has as many streams open as it may."""
        if self._open[who.key_id] >= who.limits.streams:
            raise ServiceError("this key has too many event streams open: close one", 429, "too_many_streams")

    def end(self) -> None:
        """End every stream, those too that have yet to begin: the service ends, and its clients ask again."""
        self._over = True
        for tail in self._tails.values():
            self._hand_out(tail, None)

    async def stream(self, run_id: str, after: int, who: Principal) -> AsyncIterator[bytes]:
        """Events with seq > after as server-sent ones, to the run's end. The caller has seen that the run exists."""
        yield format_sse_event(retry=RETRY_MS)
        last = await briefly(self._store, self._store.events.last, run_id)
        with self._counted(who), self._heard(run_id, last) as (tail, queue):
            reached = max(after, tail.seq)
            async for sent in self._replay(run_id, after, reached):
                yield sent
            while not self._over and (batch := await queue.get()) is not None:
                number, sent = batch
                if number > reached or sent is KEEPALIVE_COMMENT:
                    yield sent
            heard_all = queue in tail.queues and not self._over  # else it was let go of, and its client asks again
        if tail.ended is not None and heard_all:
            yield format_sse_event(event="end", data_str=json.dumps({"status": tail.ended.value}))

    @contextmanager
    def _counted(self, who: Principal) -> Iterator[None]:
        self._open[who.key_id] += 1
        try:
            yield
        finally:
            self._open[who.key_id] -= 1

    @contextmanager
    def _heard(self, run_id: str, last: int) -> Iterator[tuple[_Tail, asyncio.Queue[Batch | None]]]:
        tail = self._tails.get(run_id)
        if tail is None:
            tail = self._tails[run_id] = _Tail(seq=last)
            tail.task = asyncio.create_task(self._read(run_id, tail))
        queue: asyncio.Queue[Batch | None] = asyncio.Queue(BEHIND)
        tail.queues.add(queue)
        try:
            yield tail, queue
        finally:
            tail.queues.discard(queue)
            if not tail.queues and self._tails.get(run_id) is tail:
                del self._tails[run_id]
                assert tail.task is not None
                tail.task.cancel()

    async def _replay(self, run_id: str, after: int, until: int) -> AsyncIterator[bytes]:
        """What was handed out before this follower came."""
        while after < until and not self._over:
            limit = min(FEW, until - after)  # numbers have no gaps
            events = await briefly(self._store, self._store.events.list, run_id, after=after, limit=limit)
            if not events:
                return
            after = events[-1].seq
            yield _sent(events)

    async def _read(self, run_id: str, tail: _Tail) -> None:
        """Hand out what comes, until the run is at its end."""
        spoke = time.monotonic()
        with suppress(ServiceError):  # the run was deleted, or the database is away: its clients ask again
            while True:
                count, sent, tail.ended = await briefly(self._store, self._next, run_id, tail.seq)
                if tail.ended is not None:
                    break
                if not count and time.monotonic() > spoke + self._keepalive_s:
                    sent = KEEPALIVE_COMMENT
                if sent:
                    tail.seq += count  # numbers have no gaps
                    self._hand_out(tail, (tail.seq, sent))
                    spoke = time.monotonic()
                await asyncio.sleep(0 if count == FEW else self._poll_s)
        del self._tails[run_id]
        self._hand_out(tail, None)

    def _next(self, run_id: str, after: int) -> tuple[int, bytes, State | None]:
        """How many events there are behind one, what is sent of them, and how the run ended, once there are no more.

        A run that tells something is not asked for its state. Events of a final one are read after that was seen.
        """
        events = self._store.events.list(run_id, after=after, limit=FEW)
        ended = None
        if not events and (state := self._store.runs.state(run_id)).final:
            events = self._store.events.list(run_id, after=after, limit=FEW)
            ended = None if events else state
        return len(events), _sent(events), ended

    def _hand_out(self, tail: _Tail, batch: Batch | None) -> None:
        for queue in list(tail.queues):
            if queue.full():  # its connection does not drain: let go of it rather than hold everything it misses
                tail.queues.discard(queue)
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(batch)


def _sent(events: list[Event]) -> bytes:
    return b"".join(
        format_sse_event(event="run.event", id=str(event.seq), data_str=json.dumps(event_resource(event)))
        for event in events
    )
