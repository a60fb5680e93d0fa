"""Weights from the learner's device to the worker's: the worker's side. The learner's is learner/outbox.py.

    worker    open ──► call the learner, build the link ── (kept for the versions to come)
              begin ──────► "send 7" ──► learner: {pieces} | {stale}
              pieces ◄──────── link ◄─── its room, piece by piece, each of whole tensors
              end ────────► "done" ────► learner: the room may be written again

Nothing waits in the middle: an engine loads a piece while the next one is on its way, and keeps none. What has come is
therefore only whole once all has come, and who loads it must not serve before. A sender that dies midway is noticed at
once by the end of the line, one that hangs by PATIENCE_S. Checksums are not looked at here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from typing import TYPE_CHECKING, Any

from potstill.errors import StaleWeights, WeightsError
from potstill.transports import Kept
from potstill.transports.line import Line

if TYPE_CHECKING:
    from torch import Tensor

    from potstill.transports.links import Link

PATIENCE_S = 300.0  # that either side waits for the other within one version
POLL_S = 0.05  # between two looks at whether the learner is still there
LAST_WORDS_S = 2.0  # that the end of a process takes to be heard
AHEAD = 2  # pieces that have come and are not loaded yet, at most

CALLER = "device"  # in a receiver's memory


@dataclass(frozen=True, slots=True)
class DevicePayload:
    """Whom to call for a version. The key opens the line; who has it gets the weights."""

    host: str
    port: int
    version: int
    key: bytes = field(repr=False)

    def open(self, kept: Kept) -> Stream:
        """Nothing is sent yet. Raises StaleWeights when the learner is gone, WeightsError for want of a link to it."""
        caller = kept.get(CALLER)
        if caller is None or caller.closed or caller.address != (self.host, self.port):
            if caller is not None:
                caller.close()
            caller = kept[CALLER] = Caller(self.host, self.port, self.key)
        return Stream(caller, self.version)


class Caller:
    """A worker's standing line to one learner, and the link beside it."""

    def __init__(self, host: str, port: int, key: bytes) -> None:
        self.address = (host, port)
        self.closed = False
        try:
            self.line = Line.call(host, port, key)
        except (OSError, EOFError, AuthenticationError) as error:
            raise StaleWeights(f"the learner at {host}:{port} does not answer ({error}); ask for the newest") from error
        try:
            self.link: Link = self._linked(host)
        except (OSError, EOFError, RuntimeError) as error:
            failed = self.line.over(LAST_WORDS_S)
            self.line.hang_up()
            if failed is not None:
                raise StaleWeights(f"the learner at {host}:{port} gave up: {failed}; ask for the newest") from error
            raise WeightsError(
                f'no link to the learner\'s device ({error}): set weights.transport = "auto", which goes through memory'
            ) from error

    def close(self) -> None:
        """From any thread. A transfer in between is cut off on both sides."""
        if not self.closed:
            self.closed = True
            self.line.hang_up()
            self.link.drop()

    def _linked(self, host: str) -> Link:
        from potstill.transports import links

        device = links.here()
        self.line.say(device=links.name_of(device))
        offered = self.line.hear(PATIENCE_S)
        kind = offered["link"]
        if kind == "ipc":
            return links.Mapped(offered["handle"], offered["nbytes"], device)
        store = links.store_at(host, offered["store"], offered["number"])
        return links.Pair(kind, store, links.TAKER, device=device, address=self.line.here, limit_s=PATIENCE_S)


class Stream:
    """One version that comes when it is asked to. Used by one thread at a time; not used again after a failure."""

    def __init__(self, caller: Caller, version: int) -> None:
        self._caller = caller
        self._version = version
        self._pieces: list[tuple[int, int]] = []
        self._came: queue.Queue[Tensor | Exception] = queue.Queue(AHEAD)

    def begin(self) -> None:
        """Have the learner send. Raises StaleWeights when it has another version by now, or is gone."""
        try:
            self._caller.line.say(send=self._version)
            answer = self._caller.line.hear(PATIENCE_S)
        except (OSError, EOFError) as error:
            self._caller.close()
            raise StaleWeights(f"weights version {self._version}: the learner that published it is gone") from error
        if "stale" in answer:
            raise StaleWeights(f"weights version {self._version}: {answer['stale']}; ask for the newest")
        self._pieces = [(start, stop) for start, stop in answer["pieces"]]
        threading.Thread(target=self._take, name="weights", daemon=True).start()

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(first byte, uint8 [n]) of each piece, in order. Raises StaleWeights when they stop coming."""
        deadline = time.monotonic() + PATIENCE_S
        for start, _ in self._pieces:
            yield start, self._next(deadline)

    def end(self) -> None:
        """All of it is used: the learner may write over it. It may have ended by now; the version is here."""
        try:
            self._caller.line.say(done=self._version)
        except OSError:
            self._caller.close()

    def drop(self) -> None:
        """Take no more of it, however much has come."""
        self._caller.close()

    def _take(self) -> None:
        """On a thread of its own, which is left behind where a device never answers."""
        try:
            for start, stop in self._pieces:
                self._put(self._caller.link.take(start, stop))
        except Exception as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._caller.closed:
            with suppress(queue.Full):
                self._came.put(item, timeout=POLL_S)
                return

    def _next(self, deadline: float) -> Tensor:
        while True:
            try:
                piece = self._came.get(timeout=POLL_S)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise self._stopped(f"not all of it came within {PATIENCE_S:g} s") from None
                if (failed := self._caller.line.over()) is not None:
                    raise self._stopped(f"its sender stopped: {failed}") from None
                continue
            if isinstance(piece, Exception):
                raise self._stopped(self._caller.line.over(LAST_WORDS_S) or str(piece)) from piece
            return piece

    def _stopped(self, why: str) -> StaleWeights:
        return StaleWeights(f"weights version {self._version} stopped on its way ({why}); ask for the newest")
