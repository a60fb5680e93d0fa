"""Nothing is trained that is too old, and nothing is lost by it. S: max_staleness, B: prompts per step, C: per call."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.buffer import Buffer
from potstill.types import Receipt
from tests.buffers import hold, make_buffer, prompts_of, spanning, turns, waits, write
from tests.receipts import make_receipt

FOREVER_S = 3600.0


async def test_what_can_only_end_too_old_is_ended_quietly_and_written_anew():
    buffer = make_buffer(B=1, C=1, S=0, order="finish", oversample=1.0)
    slow, writing = await hold(buffer)
    assert await write(buffer) == range(1, 2)
    await buffer.batch(1)
    buffer.advance(1)
    buffer.advance(1)
    await writing
    assert slow.ended == ["quietly"]
    assert await write(buffer, version=1) == range(1)
    assert prompts_of(await buffer.batch(2)) == ["train-0"]


@pytest.mark.parametrize("advances_first", [True, False])
async def test_who_is_ended_from_outside_as_well_is_not_ended_quietly(advances_first: bool):
    buffer = make_buffer(B=1, C=1, S=0, order="finish", oversample=1.0)
    slow, writing = await hold(buffer)
    await write(buffer)
    await buffer.batch(1)
    if advances_first:
        buffer.advance(1)
    writing.cancel()
    buffer.advance(1)
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert slow.ended == []


async def test_a_worker_whose_lease_was_ended_may_be_cancelled_later():
    buffer = make_buffer(B=1, C=1, S=0, order="finish", oversample=1.0)

    async def work() -> None:
        async with buffer.lease(lambda: 0):
            await asyncio.sleep(FOREVER_S)
        await asyncio.sleep(FOREVER_S)

    writing = await waits(work())
    await write(buffer)
    await buffer.batch(1)
    buffer.advance(1)
    await turns()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(writing, 1)


async def test_in_prompt_order_and_where_old_tokens_are_masked_nothing_is_ended():
    for loop in ({"order": "prompt"}, {"order": "finish", "oversample": 1.0, "stale": "mask"}):
        buffer = make_buffer(B=1, C=1, S=1, **loop)
        await write(buffer)
        _, writing = await hold(buffer)
        await buffer.batch(1)
        buffer.advance(1)
        buffer.advance(2)
        await turns()
        assert not writing.done()
        writing.cancel()


async def test_what_is_too_old_when_its_turn_comes_is_refused_and_written_anew():
    buffer = make_buffer(B=1, C=3, S=0, order="finish", oversample=2.0)
    for _ in range(3):
        await write(buffer)
    await buffer.batch(1)
    buffer.advance(1)
    waiting = await waits(buffer.batch(2))
    assert (buffer.num_refused, buffer.num_waiting) == (2, 0)
    assert await write(buffer, version=1) == range(1, 2)
    assert prompts_of(await waiting) == ["train-1"]


@pytest.mark.parametrize("unscored", [0, 1])
async def test_where_old_tokens_are_masked_a_batch_counts_the_fresh_ones(unscored: int):
    buffer = make_buffer(B=1, C=1, S=0, steps=9, version=3, stale="mask", order="finish", unscored=0.5)
    async with buffer.lease(lambda: 3) as chunk:
        buffer.advance(4)
        buffer.put(chunk, [[spanning(3, (3, 7, 7), (4, 5, unscored))]])
    batch = await buffer.batch(5)
    assert (batch.num_loss_tokens, batch.num_sequences, batch.oldest_version) == (5 - unscored, 1, 4)
    assert buffer.num_refused == 0


async def test_where_old_tokens_are_masked_a_text_without_a_fresh_one_is_written_anew():
    buffer = make_buffer(B=1, C=1, S=0, stale="mask", order="finish")
    waiting = await waits(buffer.batch(2))
    async with buffer.lease(lambda: 0) as chunk:
        buffer.advance(1)
        buffer.put(chunk, [[make_receipt(0, version=0)]])
    await turns()
    assert not waiting.done()
    assert await write(buffer, version=1) == range(1)
    assert (await waiting).num_loss_tokens == 5


@dataclass
class Race:
    """Workers that fail, follow late and hand in in any order, and a learner; each with pauses of random length."""

    B: int
    C: int
    steps: int
    S: int
    num_workers: int
    seed: int
    loop: dict[str, Any]
    version: int = 0
    trained: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    async def pause(self) -> None:
        for _ in range(self.dice.randrange(6)):
            await asyncio.sleep(0)

    async def run(self) -> None:
        buffer = make_buffer(B=self.B, C=self.C, steps=self.steps, S=self.S, **self.loop)
        workers = [asyncio.create_task(self._worker(buffer)) for _ in range(self.num_workers)]
        await asyncio.wait_for(self._learn(buffer), 10)
        for worker in workers:
            worker.cancel()
        ends = await asyncio.gather(*workers, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        assert buffer.trained == [range(self.B * self.steps)]

    async def _worker(self, buffer: Buffer) -> None:
        held = [0]
        await asyncio.gather(self._follow(buffer, held), self._write(buffer, held), self._write(buffer, held))

    async def _follow(self, buffer: Buffer, held: list[int]) -> None:
        while True:
            await self.pause()
            await asyncio.sleep(0)
            if held[0] != self.version:
                held[0] = self.version
                buffer.worker_moved()

    async def _write(self, buffer: Buffer, held: list[int]) -> None:
        while True:
            try:
                async with buffer.lease(lambda: held[0]) as chunk:
                    assert chunk.start // self.B == (chunk.stop - 1) // self.B
                    oldest = held[0]
                    await self.pause()
                    if self.dice.random() < 0.2:
                        raise OSError("this call failed")
                    buffer.put(chunk, [[self._receipt(prompt, oldest, held[0])] for prompt in chunk])
            except OSError:
                await self.pause()

    def _receipt(self, prompt: int, oldest: int, newest: int) -> Receipt:
        if oldest == newest:
            return make_receipt(prompt, version=oldest)
        return spanning(prompt, (oldest, 3, 0), (newest, 2, 0))

    async def _learn(self, buffer: Buffer) -> None:
        for step in range(1, self.steps + 1):
            batch = await buffer.batch(step)
            self.trained += prompts_of(batch)
            assert len(set(prompts_of(batch))) == self.B
            assert batch.oldest_version == max(0, step - 1 - self.S)
            for receipt in batch.receipts:
                assert receipt.fresh_tokens(batch.oldest_version)[0] > 0
                assert self.loop["stale"] == "mask" or step - 1 - receipt.oldest_version <= self.S
            await self.pause()
            self.version = step
            buffer.advance(step)


loops = st.fixed_dictionaries(
    {
        "order": st.sampled_from(["prompt", "finish"]),
        "oversample": st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.5]),
        "stale": st.sampled_from(["refuse", "mask"]),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    B=st.integers(1, 5), C=st.integers(1, 6), steps=st.integers(1, 5), S=st.integers(0, 3),
    num_workers=st.integers(1, 4), seed=st.integers(0, 2**32), loop=loops,
)  # fmt: skip
def test_every_prompt_is_trained_once_and_in_time_however_workers_and_learner_interleave(
    B: int, C: int, steps: int, S: int, num_workers: int, seed: int, loop: dict[str, Any]
):
    race = Race(B=B, C=C, steps=steps, S=S, num_workers=num_workers, seed=seed, loop=loop)
    asyncio.run(race.run())
    everything = [f"train-{prompt}" for prompt in range(B * steps)]
    assert sorted(race.trained) == sorted(everything)
    assert race.trained == everything or loop["order"] == "finish"
