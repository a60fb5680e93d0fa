"""The bench of the loop: its clock, its wire, and that a small run of it ends with figures that can be true."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.scale import __main__ as scale
from bench.scale.one_process import Skipping, Wire
from bench.scale.stand_ins import Cost, SimulatedWorker, published
from potstill.types import Prompt

PROMPT = Prompt(id="train-0", index=0, messages=(), domain="test", answer=None, solution=None)


def test_time_is_skipped_while_everybody_waits():
    began = time.perf_counter()
    with asyncio.Runner(loop_factory=Skipping) as runner:

        async def wait() -> float:
            before = asyncio.get_running_loop().time()
            await asyncio.gather(asyncio.sleep(3600), asyncio.sleep(7200))
            return asyncio.get_running_loop().time() - before

        assert runner.run(wait()) == pytest.approx(7200, abs=1)
    assert time.perf_counter() - began < 5


def test_time_passes_while_something_is_computed():
    with asyncio.Runner(loop_factory=Skipping) as runner:

        async def compute() -> float:
            before = asyncio.get_running_loop().time()
            time.sleep(0.05)
            return asyncio.get_running_loop().time() - before

        assert runner.run(compute()) >= 0.05


async def test_what_passes_a_handle_is_counted_and_copied():
    class Echo:
        async def same(self, value: list[int]) -> list[int]:
            value.append(1)
            return value

    wire, sent = Wire(), [0]
    assert await wire.handle(Echo()).same.remote(sent) == [0, 1]
    assert sent == [0]
    assert wire.num_bytes > 0


@pytest.mark.parametrize("order", ["finish", "prompt"])
def test_a_loop_that_has_time_keeps_its_workers_writing(order: str):
    found = scale.simulated(16, Cost(), order)
    assert found["rollouts"] >= scale.FEWEST_ROLLOUTS
    assert 0.8 < found["efficiency"] < 1.2
    assert found["staleness_max"] <= scale.MAX_STALENESS
    assert found["bytes_per_rollout"] < found["bulk_bytes_per_rollout"] / 1000


def test_a_worker_that_loads_weights_writes_nothing_meanwhile():
    cost = Cost(sigma=0.0, mean_tokens=100.0, tokens_per_s=10.0, load_s=3.0, scored_tokens_per_s=1e9)

    async def write_while_loading() -> float:
        worker, began = SimulatedWorker(0, cost), asyncio.get_running_loop().time()
        writing = asyncio.create_task(worker.rollout(range(1), [PROMPT], 0))
        await asyncio.sleep(1)
        await worker.load_weights(published(1))
        await writing
        return asyncio.get_running_loop().time() - began

    with asyncio.Runner(loop_factory=Skipping) as runner:
        assert runner.run(write_while_loading()) == pytest.approx(10 + 3, abs=0.5)
