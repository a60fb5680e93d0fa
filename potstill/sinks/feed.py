"""One sink's thread and its queue: the wall between a run and whoever is told about it.

`put` never waits and never raises: a full queue gives its oldest record up. A sink that is lost is opened again, later
and later; one that hangs is left alone until the run ends, and then for as long as the deadline allows. The thread
writes no event itself, for a journal has one writer: its troubles wait here until the run's own thread fetches them.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from potstill.errors import SinkError
from potstill.sinks.sink import Ending, Facts, Record, Sink, SinkLost, hand

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0  # before a sink is opened again
SILENCE_S = 60.0  # over one record; then people are told
MAX_CAUSES = 5  # of one sink that are told
LAST_WORDS_S = 1.0  # for the thread, after its sink was abandoned
_PASSING = re.compile(r"0x[0-9a-fA-F]+|\d+")  # addresses, ports, numbers of requests: the same cause all the same


class Feed:
    """Feeds `sink` in the order of `put`, from its own daemon thread, which starts at once.

    `abandon` ends whatever the sink is doing, from another thread and for good; without it a sink that hangs keeps its
    thread, which dies with the process.
    """

    def __init__(
        self, name: str, sink: Sink, facts: Facts, *, capacity: int, abandon: Callable[[], None] = lambda: None
    ) -> None:
        self.name = name
        self._abandon = abandon
        self._abandoned = False
        self._sink = sink
        self._facts = facts
        self._capacity = capacity
        self._changed = threading.Condition()
        self._queue: deque[Record] = deque()
        self._ending: Ending | None = None
        self._offered = 0  # counted by the run's thread
        self._taken = 0  # counted by the sink's
        self._busy_since: float | None = None
        self._delay_s = FIRST_DELAY_S
        self._causes: set[str] = set()
        self._untold: deque[str] = deque()
        self._thread = threading.Thread(target=self._run, name=f"potstill-sink-{name}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        with self._changed:
            self._offered += 1
            if len(self._queue) == self._capacity:
                self._queue.popleft()
            self._queue.append(record)
            self._changed.notify()

    def troubles(self) -> Iterator[str]:
        """Each cause of a failure, once."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > SILENCE_S:
            self._notice(f"it has not taken a record for {SILENCE_S:.0f} s")
        while self._untold:
            yield self._untold.popleft()

    def end(self, ending: Ending) -> None:
        """Ask for the end, once what waits is taken. Returns at once."""
        with self._changed:
            self._ending = ending
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Wait for that end until `deadline` (time.monotonic), then abandon what is not done."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._notice("it was not done when the time for it was over (sinks.close_s)")
            self.abandon()
            self._thread.join(LAST_WORDS_S)

    def abandon(self) -> None:
        """End it, whatever it is doing. What it says to that is told to nobody."""
        self._abandoned = True
        self._abandon()

    @property
    def lost(self) -> int:
        """Records that the sink did not take, as far as is known; of use after `join`."""
        return self._offered - self._taken

    def _run(self) -> None:
        try:
            while self._open() and not self._feed():
                self._rest()
        except Exception as error:
            self._notice(f"{type(error).__name__}: {error}")
            raise  # a mistake in a sink: its traceback is for whoever mends it

    def _open(self) -> bool:
        """Try until it is open. False: the run has ended, and the sink does not open even then."""
        while True:
            last = self._ending is not None
            try:
                self._sink.open(self._facts)
            except SinkError as error:
                self._notice(str(error))
            else:
                self._facts = replace(self._facts, resumed=True)
                return True
            if last:
                return False
            self._rest()

    def _feed(self) -> bool:
        """Hand on what comes until the end. False: the sink is lost before that."""
        try:
            while (record := self._next()) is not None:
                self._hand(record)
            assert self._ending is not None, "records come until the end"
            self._sink.finish(self._ending)
        except SinkError as error:
            self._notice(str(error))
            return self._ending is not None
        return True

    def _next(self) -> Record | None:
        """Wait for it. None: the run has ended, and there is none left."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ending is not None)
            return self._queue.popleft() if self._queue else None

    def _hand(self, record: Record) -> None:
        self._busy_since = time.monotonic()
        try:
            hand(self._sink, record)
        except SinkLost:
            raise
        except SinkError as error:
            self._notice(str(error))
        else:
            self._taken += 1
            self._delay_s = FIRST_DELAY_S
        finally:
            self._busy_since = None

    def _rest(self) -> None:
        """Before another try; the end of the run cuts it short."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending is not None, self._delay_s)
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)

    def _notice(self, cause: str) -> None:
        """Keep a cause to be told, unless it was kept before, or too many were."""
        text = " ".join("".join(char if char.isprintable() else " " for char in cause).split())[:300]
        kind = _PASSING.sub("", text)
        with self._changed:
            if not self._abandoned and kind not in self._causes and len(self._causes) < MAX_CAUSES:
                self._causes.add(kind)
                self._untold.append(text)
