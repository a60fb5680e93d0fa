"""What a wish to stop ends at once: the work itself, before or after it has begun, and nothing that is done."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.buffer import Closed
from orchestrator.stopping import unless_asked


class Work:
    """Takes for ever, unless it is told the answer; `steps` is how far it came."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.answer: asyncio.Future[int] = asyncio.Future()

    async def run(self) -> int:
        self.steps.append("begun")
        try:
            return await self.answer
        except asyncio.CancelledError:
            self.steps.append("cancelled")
            raise


async def test_who_is_not_asked_has_the_answer():
    stopping, work = asyncio.Event(), Work()
    work.answer.set_result(7)
    assert await unless_asked(stopping, work.run()) == 7


async def test_who_is_asked_meanwhile_leaves_the_work():
    stopping, work = asyncio.Event(), Work()
    working = asyncio.create_task(unless_asked(stopping, work.run()))
    await asyncio.sleep(0.01)
    assert work.steps == ["begun"]
    stopping.set()
    with pytest.raises(Closed):
        await asyncio.wait_for(working, 5)
    assert work.steps == ["begun", "cancelled"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_who_was_asked_before_begins_nothing():
    stopping, work = asyncio.Event(), Work()
    stopping.set()
    with pytest.raises(Closed):
        await unless_asked(stopping, work.run())
    assert work.steps == []


async def test_what_the_work_raises_is_raised():
    work = Work()
    work.answer.set_exception(OSError("broken"))
    with pytest.raises(OSError, match="broken"):
        await unless_asked(asyncio.Event(), work.run())
