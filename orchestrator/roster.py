"""The run's rollout workers: who is here, who was lost, and who comes in their place.

    hire ──► arrivals ──► present ──► lost ──► hire again, after a pause that doubles

Knows nothing of what they do. A place that loses its worker too often in a row, with no work done between, ends the
run with the last cause; so does whatever a worker says that hiring another would not mend.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from potstill.errors import WorkerLost

PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(slots=True, eq=False)
class Worker:
    """A rollout worker's process, and the weights that it writes with."""

    number: int
    actor: Any
    version: int
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return f"rollout worker {self.number}"


Hire = Callable[[int, bool], Awaitable[Worker]]
"""The worker of a place; True: another than the one that was there."""
Report = Callable[[int, WorkerLost], None]
"""Told of every loss with its place: of a worker that was here, and of one that never came."""


class Roster:
    """`wanted` places, of which `at_least` must have a worker before the run begins."""

    def __init__(self, hire: Hire, report: Report, *, wanted: int, at_least: int, restarts: int) -> None:
        self._hire = hire
        self._report = report
        self._wanted = wanted
        self._at_least = min(at_least, wanted)
        self._restarts = restarts
        self._present: dict[int, Worker] = {}
        self._losses: Counter[int] = Counter()  # in a row, by place
        self._hiring: dict[int, asyncio.Task[None]] = {}
        self._failure: Exception | None = None  # what ends the run
        self._news = asyncio.Event()  # replaced as soon as it is set: whoever waits, wakes

    @property
    def present(self) -> list[Worker]:
        return [self._present[number] for number in sorted(self._present)]

    async def open(self) -> None:
        """Wait for the workers that the run begins with; the others join when they come. Raises what one of them
        raised."""
        for number in range(self._wanted):
            self._begin(number)
        await self._until(lambda: len(self._present) >= self._at_least)

    async def arrivals(self) -> AsyncIterator[Worker]:
        """Every worker as it comes, those who are here already first. Raises what ends the run."""
        seen: set[Worker] = set()
        while True:
            self._check()
            news = self._news  # before the look: what comes while a worker is welcomed is not missed
            for worker in self.present:
                if worker not in seen:
                    seen.add(worker)
                    yield worker
            await news.wait()

    async def somebody(self) -> Worker:
        """A worker that is here, the first; waits for one."""
        await self._until(lambda: bool(self._present))
        return self.present[0]

    def worked(self, worker: Worker) -> None:
        """What it was asked is done: its place is sound, if it is still there."""
        if self._present.get(worker.number) is worker:
            self._losses[worker.number] = 0

    def lost(self, worker: Worker, error: WorkerLost) -> None:
        """It is gone; hire another. To be told twice changes nothing."""
        if self._present.get(worker.number) is worker:
            del self._present[worker.number]
            self._count(worker.number, error)

    async def close(self) -> None:
        for task in self._hiring.values():
            task.cancel()
        await asyncio.gather(*self._hiring.values(), return_exceptions=True)

    def _count(self, number: int, error: WorkerLost) -> None:
        self._report(number, error)
        self._losses[number] += 1
        if self._losses[number] > self._restarts:
            times = self._losses[number]
            self._fail(type(error)(f"rollout worker {number} was lost {times} times in a row: {error}"))
        else:
            self._begin(number)

    def _begin(self, number: int) -> None:
        self._hiring[number] = asyncio.create_task(self._fill(number))

    async def _fill(self, number: int) -> None:
        losses = self._losses[number]
        if losses:
            await asyncio.sleep(pause_s(losses))
        try:
            worker = await self._hire(number, losses > 0)
        except WorkerLost as error:
            self._count(number, error)
        except Exception as error:
            self._fail(error)
        else:
            self._present[number] = worker
            self._tell()

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._tell()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._check()
            await self._news.wait()


def pause_s(losses: int) -> float:
    """Seconds before a place is filled again that lost its worker so often in a row.

    >>> [pause_s(losses) for losses in (1, 2, 3, 7, 5000)]
    [0.5, 1.0, 2.0, 30.0, 30.0]
    """
    return min(LONGEST_PAUSE_S, PAUSE_S * 2.0 ** min(losses - 1, 30))
