"""What became of a call to a process: its result, or one of our errors; with real processes that die."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from orchestrator.outcome import end, outcome, revocable
from potstill.errors import ConfigError, LearnerLost, RunError, WorkerLost


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def process(cluster: None) -> Any:
    class Process:
        def __init__(self) -> None:
            self.cancelled = 0

        async def answer(self) -> int:
            return 7

        async def refuse(self) -> None:
            raise ConfigError("rollout.engine: no such model")

        async def stumble(self) -> None:
            raise ZeroDivisionError("a bug")

        async def die(self) -> None:
            os._exit(1)

        async def work(self) -> None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

        async def num_cancelled(self) -> int:
            return self.cancelled

    return ray.remote(num_cpus=0)(Process).remote()


async def test_a_call_ends_with_its_result_or_with_what_the_process_said(process: Any):
    assert await outcome("worker", process.answer.remote()) == 7
    with pytest.raises(ConfigError, match=r"^rollout.engine: no such model$"):
        await outcome("worker", process.refuse.remote())
    with pytest.raises(RunError, match="the worker failed: ZeroDivisionError: a bug"):
        await outcome("worker", process.stumble.remote())


@pytest.mark.parametrize(("who", "gone"), [("rollout worker", WorkerLost), ("learner", LearnerLost)])
async def test_a_process_that_died_or_was_ended_is_lost(process: Any, who: str, gone: type[WorkerLost]):
    with pytest.raises(gone, match=f"the {who}'s process died") as caught:
        await outcome(who, process.die.remote())
    assert type(caught.value) is gone
    await end(process)
    with pytest.raises(gone, match="died"):
        await outcome(who, process.answer.remote())


async def test_work_that_nobody_waits_for_any_more_is_cancelled_where_it_runs(process: Any):
    waiting = asyncio.create_task(revocable("worker", process.work.remote()))
    await outcome("worker", process.answer.remote())  # by then the work has begun
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(10):
        while not await outcome("worker", process.num_cancelled.remote()):
            await asyncio.sleep(0.05)
