"""The adaptive limit, with requests that are let go one by one: no clock, no sleeping."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from potstill.calling.concurrency import AdaptiveLimit, Slot


async def settled() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


class Requests:
    """Requests that take their slot when they can, and end when they are told to."""

    def __init__(self, limit: AdaptiveLimit) -> None:
        self._limit = limit
        self.running: list[int] = []
        self.slots: dict[int, Slot] = {}
        self._ends: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def start(self, *numbers: int) -> None:
        for number in numbers:
            self._ends[number] = asyncio.Event()
            self.tasks[number] = asyncio.create_task(self._run(number))

    async def end(self, *numbers: int) -> None:
        for number in numbers:
            self._ends[number].set()
        await settled()

    async def _run(self, number: int) -> None:
        async with self._limit.slot() as self.slots[number]:
            self.running.append(number)
            await self._ends[number].wait()
            self.running.remove(number)


async def succeed(limit: AdaptiveLimit, times: int) -> None:
    for _ in range(times):
        async with limit.slot() as slot:
            slot.succeeded()


async def test_no_more_run_than_the_ceiling_and_the_others_follow_in_order():
    requests = Requests(AdaptiveLimit(2))
    requests.start(1, 2, 3, 4)
    await settled()
    assert requests.running == [1, 2]
    await requests.end(2)
    assert requests.running == [1, 3]
    await requests.end(1, 3)
    assert requests.running == [4]
    await requests.end(4)


async def test_refusals_of_one_round_trip_halve_the_limit_once():
    limit = AdaptiveLimit(8)
    async with AsyncExitStack() as stack:
        slots = [await stack.enter_async_context(limit.slot()) for _ in range(8)]
        for slot in slots:
            slot.overloaded()
    assert limit.limit == 4
    async with limit.slot() as later:
        later.overloaded()
    assert limit.limit == 2


async def test_the_limit_never_falls_below_one():
    limit = AdaptiveLimit(3)
    for _ in range(5):
        async with limit.slot() as slot:
            slot.overloaded()
    assert limit.limit == 1
    await succeed(limit, 1)
    assert limit.limit == 2


async def test_as_many_successes_as_the_limit_raise_it_by_one_up_to_the_ceiling():
    limit = AdaptiveLimit(4)
    async with limit.slot() as slot:
        slot.overloaded()
    seen = []
    for _ in range(10):
        await succeed(limit, 1)
        seen.append(limit.limit)
    assert seen == [2, 3, 3, 3, 4, 4, 4, 4, 4, 4]


async def test_a_refusal_forgets_the_successes_before_it():
    limit = AdaptiveLimit(8)
    async with limit.slot() as slot:
        slot.overloaded()
    await succeed(limit, 3)
    async with limit.slot() as slot:
        slot.overloaded()
    await succeed(limit, 1)
    assert limit.limit == 2


async def test_after_a_cut_nobody_starts_until_enough_have_ended():
    requests = Requests(AdaptiveLimit(4))
    requests.start(1, 2, 3, 4, 5)
    await settled()
    requests.slots[1].overloaded()
    await requests.end(1, 2)
    assert requests.running == [3, 4]
    await requests.end(3)
    assert requests.running == [4, 5]
    await requests.end(4, 5)


async def test_growing_lets_a_waiting_request_in():
    limit = AdaptiveLimit(2)
    async with limit.slot() as slot:
        slot.overloaded()
    requests = Requests(limit)
    requests.start(1, 2)
    await settled()
    assert requests.running == [1]
    requests.slots[1].succeeded()
    await settled()
    assert requests.running == [1, 2]
    await requests.end(1, 2)


async def test_a_waiting_request_that_is_cancelled_leaves_its_turn_to_the_next():
    limit = AdaptiveLimit(1)
    requests = Requests(limit)
    requests.start(1, 2, 3)
    await settled()
    requests.tasks[2].cancel()
    await requests.end(1)
    assert requests.running == [3]
    await requests.end(3)
    assert limit.in_flight == 0


async def test_a_request_that_is_cancelled_as_its_slot_comes_passes_it_on():
    limit = AdaptiveLimit(1)
    requests = Requests(limit)
    async with limit.slot():
        requests.start(1, 2)
        await settled()
    requests.tasks[1].cancel()  # its turn has come, and it has not run since
    await settled()
    assert requests.running == [2]
    await requests.end(2)
    assert limit.in_flight == 0


async def test_a_request_that_fails_gives_its_slot_back():
    limit = AdaptiveLimit(1)
    with pytest.raises(KeyError):
        async with limit.slot():
            raise KeyError
    async with asyncio.timeout(1), limit.slot():
        assert limit.in_flight == 1


def test_a_ceiling_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        AdaptiveLimit(0)
