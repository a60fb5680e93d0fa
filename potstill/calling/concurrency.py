"""AdaptiveLimit: how many requests may be in flight at once, found out by how the other side bears them.

Additive increase, multiplicative decrease, as TCP does it (Chiu and Jain, 1989): an answer that says "too much" halves
the limit, and as many good answers as the limit is high raise it by one. It knows no HTTP, no time and no retries.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class AdaptiveLimit:
    """Starts at `ceiling`, stays between 1 and it. Slots are given in the order of asking. Lives in one event loop."""

    def __init__(self, ceiling: int) -> None:
        if ceiling < 1:
            raise ValueError(f"the ceiling must be at least 1, not {ceiling}")
        self._ceiling = self._limit = ceiling
        self._in_flight = 0
        self._successes = 0  # since the limit last moved
        self._cuts = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Wait until a request may be sent. Tell the slot how it went, if that says anything about load."""
        await self._enter()
        try:
            yield Slot(self, self._cuts)
        finally:
            self._in_flight -= 1
            self._wake()

    async def _enter(self) -> None:
        if self._in_flight < self._limit and not self._waiting:
            self._in_flight += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot came in the same moment: the next in line has it
                self._in_flight -= 1
                self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and self._in_flight < self._limit:
            turn = self._waiting.popleft()
            if not turn.cancelled():
                self._in_flight += 1
                turn.set_result(None)

    def _grow(self) -> None:
        self._successes += 1
        if self._successes >= self._limit and self._limit < self._ceiling:
            self._limit += 1
            self._successes = 0
            self._wake()

    def _cut(self, cuts_then: int) -> None:
        if cuts_then == self._cuts:  # requests sent before the last cut say nothing about the limit since
            self._cuts += 1
            self._limit = max(1, self._limit // 2)
            self._successes = 0


class Slot:
    """Leave to send one request."""

    def __init__(self, limit: AdaptiveLimit, cuts: int) -> None:
        self._limit = limit
        self._cuts = cuts

    def succeeded(self) -> None:
        self._limit._grow()

    def overloaded(self) -> None:
        """The other side said that it has too much to do. Halves the limit, once per round trip."""
        self._limit._cut(self._cuts)
