"""What became of a call to a process: its result, or one of our errors; with real processes that die or freeze."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from orchestrator.outcome import end, outcome, revocable
from orchestrator.pulse import first_answer
from potstill.errors import CapacityError, ConfigError, LearnerLost, RunError, WorkerLost


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

        async def take_all_memory(self) -> None:
            bytearray(1 << 60)

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


async def test_who_asks_for_more_memory_than_there_is_needs_another_setting(process: Any):
    with pytest.raises(CapacityError, match=r"the learner has run out of memory .*: lower learner.micro_batch_tokens"):
        await outcome("learner", process.take_all_memory.remote())
    assert await outcome("learner", process.answer.remote()) == 7


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


async def test_a_process_that_is_frozen_ends_all_the_same(process: Any):
    pid = await process.__ray_call__.remote(lambda _: os.getpid())
    frozen = psutil.Process(pid)
    frozen.suspend()
    await end(process)
    assert psutil.wait_procs([frozen], timeout=20.0)[1] == []


async def test_a_process_that_freezes_before_its_first_answer_is_ended_and_lost(cluster: None, tmp_path: Path):
    class Freezing:  # in here, so that Ray sends it by value: tests are no package
        def __init__(self, note: Path) -> None:
            note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)

    note = tmp_path / "pid"
    actor = ray.remote(num_cpus=0)(Freezing).remote(note)
    answering = actor.__ray_call__.remote(lambda _: 7)
    async with asyncio.timeout(60):
        while not (note.exists() and note.read_text()):
            await asyncio.sleep(0.05)
    with pytest.raises(LearnerLost, match="the learner has given no sign of life for 2 s and was ended"):
        await first_answer("learner", actor, answering, 2.0, LearnerLost)
    assert psutil.wait_procs([psutil.Process(int(note.read_text()))], timeout=20.0)[1] == []
