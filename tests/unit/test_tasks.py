"""Tasks that live and die together: the first failure is the one that is told, and none outlives the call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from orchestrator.tasks import together, until

FOREVER_S = 3600.0


class Work:
    """Coroutines that note how they ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def forever(self) -> None:
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            await asyncio.sleep(0)  # cleaning up takes its time
            self.ended.append("cancelled")

    async def answer(self, value: Any = None) -> Any:
        await asyncio.sleep(0.001)
        return value

    async def fail(self, error: Exception) -> None:
        await asyncio.sleep(0.001)
        raise error

    async def fail_in_a_group(self, error: Exception) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.forever())
            group.create_task(self.fail_in_an_inner_group(error))

    async def fail_in_an_inner_group(self, error: Exception) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.fail(error))


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture(autouse=True)
async def nothing_is_left() -> Any:
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_the_main_one_returns_ends_the_others(work: Work):
    assert await until(work.answer(7), work.forever(), work.forever()) == 7
    assert work.ended == ["cancelled", "cancelled"]


async def test_another_one_may_end_before(work: Work):
    async def late() -> str:
        await asyncio.sleep(0.01)
        return "late"

    assert await until(late(), work.answer()) == "late"


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_the_first_failure_is_raised_as_it_is_and_ends_the_others(work: Work, place: int):
    error = OSError("broken")
    calls = [work.forever(), work.forever()]
    calls.insert(place, work.fail(error))
    with pytest.raises(OSError, match="broken") as caught:
        await until(*calls)
    assert caught.value is error
    assert work.ended == ["cancelled", "cancelled"]


async def test_of_groups_of_failures_the_cause_is_raised(work: Work):
    error = OSError("broken")
    for calls in ([work.forever(), work.fail_in_a_group(error)], [work.fail_in_a_group(error)]):
        with pytest.raises(OSError, match="broken") as caught:
            await until(*calls)
        assert caught.value is error


async def test_what_fails_in_the_moment_of_the_end_comes_too_late(work: Work):
    assert await until(work.answer(7), work.fail(OSError("too late"))) == 7


async def test_who_is_cancelled_cancels_all(work: Work):
    for call in (until(work.forever(), work.forever()), together(work.forever(), work.forever())):
        running = asyncio.create_task(call)
        await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert work.ended == ["cancelled"] * 4


async def test_together_is_every_answer_in_order(work: Work):
    assert await together(work.answer(1), work.answer(2)) == [1, 2]
    assert await together() == []


async def test_together_the_first_failure_ends_the_others(work: Work):
    with pytest.raises(OSError, match="broken"):
        await together(work.forever(), work.fail(OSError("broken")))
    assert work.ended == ["cancelled"]
