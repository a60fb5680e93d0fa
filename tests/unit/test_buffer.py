"""The staleness rule, with any number of producers in any order. S is max_staleness, B prompts per step."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.buffer import Buffer
from potstill.errors import RunError, SignalLost
from tests.receipts import make_receipt


def make_buffer(*, B: int = 2, steps: int = 3, S: int = 0, unscored: float = 0.0, version: int = 0) -> Buffer:
    return Buffer(prompts_per_step=B, steps=steps, max_staleness=S, max_unscored_fraction=unscored, version=version)


def prompts_of(batch: Any) -> list[str]:
    return [receipt.prompt_id for receipt in batch.receipts]


async def waits(awaitable: Any) -> asyncio.Task[Any]:
    """The call as a task that is still waiting after everything else had its turn."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_with_no_staleness_nothing_is_granted_while_a_step_is_in_progress():
    buffer = make_buffer(B=2, S=0)
    assert await buffer.grant(2) == range(2)
    waiting = await waits(buffer.grant(2))
    for prompt in (0, 1):
        await buffer.put(prompt, [make_receipt(prompt)])
    await buffer.batch(1)
    assert not waiting.done()
    await buffer.advance(1)
    assert await waiting == range(2, 4)


async def test_with_staleness_one_the_next_step_is_granted_and_no_more():
    buffer = make_buffer(B=2, S=1)
    assert await buffer.grant(3) == range(3)
    assert await buffer.grant(3) == range(3, 4)
    await waits(buffer.grant(3))


async def test_a_grant_is_never_larger_than_asked_and_never_past_the_last_prompt():
    buffer = make_buffer(B=2, steps=2, S=9)
    assert await buffer.grant(3) == range(3)
    assert await buffer.grant(3) == range(3, 4)
    assert await buffer.grant(3) is None
    assert await buffer.grant(1) is None


async def test_the_end_of_the_run_wakes_a_waiting_producer_with_none():
    buffer = make_buffer(B=1, steps=2, S=0)
    assert await buffer.grant(1) == range(1)
    first, second = await waits(buffer.grant(1)), await waits(buffer.grant(1))
    await buffer.put(0, [make_receipt(0)])
    await buffer.batch(1)
    await buffer.advance(1)
    assert {await first, await second} == {range(1, 2), None}


async def test_a_batch_is_in_prompt_order_whatever_the_order_of_arrival():
    buffer = make_buffer(B=3)
    await buffer.grant(3)
    waiting = await waits(buffer.batch(1))
    for prompt in (2, 0, 1):
        await buffer.put(prompt, [make_receipt(prompt, sample=sample) for sample in (0, 1)])
    batch = await waiting
    assert prompts_of(batch) == ["train-0", "train-0", "train-1", "train-1", "train-2", "train-2"]
    assert (batch.step, batch.num_loss_tokens, batch.num_sequences) == (1, 30, 6)
    assert buffer.num_waiting == 0


async def test_what_arrives_early_for_the_next_step_waits_for_it():
    buffer = make_buffer(B=1, S=1)
    await buffer.grant(2)
    await buffer.put(1, [make_receipt(1)])
    await waits(buffer.batch(1))
    assert buffer.num_waiting == 1


async def test_handing_in_twice_is_refused_before_while_and_after_the_step():
    buffer = make_buffer(B=1, S=1)
    await buffer.grant(2)
    await buffer.put(0, [make_receipt(0)])
    with pytest.raises(RunError, match="prompt 0 was handed in twice"):
        await buffer.put(0, [make_receipt(0)])
    await buffer.batch(1)
    with pytest.raises(RunError, match="prompt 0 was handed in twice"):
        await buffer.put(0, [make_receipt(0)])
    await buffer.advance(1)
    with pytest.raises(RunError, match="prompt 0 was handed in twice"):
        await buffer.put(0, [make_receipt(0)])
    assert buffer.num_waiting == 0


async def test_of_two_that_hand_in_at_once_one_is_refused():
    buffer = make_buffer(B=1)
    await buffer.grant(1)
    outcomes = await asyncio.gather(
        *[buffer.put(0, [make_receipt(0, sample=sample)]) for sample in (0, 1)], return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), RunError]


async def test_what_was_never_granted_is_refused():
    buffer = make_buffer(B=2)
    with pytest.raises(RunError, match="prompt 0 was never granted"):
        await buffer.put(0, [make_receipt(0)])


async def test_a_rollout_older_than_the_rule_allows_is_refused():
    buffer = make_buffer(B=1, S=1, steps=9, version=5)
    assert await buffer.grant(2) == range(5, 7)
    with pytest.raises(RunError, match="a rollout of prompt 6 is older than version 5"):
        await buffer.put(6, [make_receipt(6, version=5), make_receipt(6, version=4)])
    await buffer.put(6, [make_receipt(6, version=5)])


async def test_text_that_the_student_did_not_write_has_no_age():
    buffer = make_buffer(B=1, steps=9, version=5)
    await buffer.grant(1)
    await buffer.put(5, [make_receipt(5, version=-1)])
    assert prompts_of(await buffer.batch(6)) == ["train-5"]


async def test_too_many_unscored_tokens_lose_the_signal():
    buffer = make_buffer(B=2, unscored=0.1)
    await buffer.grant(2)
    await buffer.put(0, [make_receipt(0, tokens=10, unscored=3)])
    await buffer.put(1, [make_receipt(1, tokens=10)])
    with pytest.raises(SignalLost, match=r"step 1: 3 of 20 loss tokens have no teacher's score; .* allows 10%"):
        await buffer.batch(1)


async def test_a_few_unscored_tokens_leave_the_denominator():
    buffer = make_buffer(B=3, unscored=0.5)
    await buffer.grant(3)
    await buffer.put(0, [make_receipt(0, tokens=10, unscored=10)])
    await buffer.put(1, [make_receipt(1, tokens=10, unscored=1)])
    await buffer.put(2, [make_receipt(2, tokens=10)])
    batch = await buffer.batch(1)
    assert (batch.num_loss_tokens, batch.num_sequences) == (19, 2)


async def test_a_step_without_a_single_scored_token_is_no_step():
    buffer = make_buffer(B=1, unscored=0.99)
    await buffer.grant(1)
    await buffer.put(0, [make_receipt(0, tokens=1, unscored=1)])
    with pytest.raises(SignalLost):
        await buffer.batch(1)


async def test_a_resumed_run_begins_with_its_versions_first_prompt():
    buffer = make_buffer(B=4, steps=3, version=2)
    assert await buffer.grant(9) == range(8, 12)
    assert await buffer.grant(9) is None


@settings(max_examples=200, deadline=None)
@given(
    B=st.integers(1, 4), steps=st.integers(1, 5), S=st.integers(0, 3), producers=st.integers(1, 4),
    at_most=st.integers(1, 5), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_no_prompt_is_lost_doubled_or_stale_however_producers_and_learner_interleave(
    B: int, steps: int, S: int, producers: int, at_most: int, seed: int
):
    """Producers and a learner with pauses of random length; the rule is checked against plain lists."""
    dice = random.Random(seed)
    published, granted, trained = [0], [], []

    async def pause() -> None:
        for _ in range(dice.randrange(6)):
            await asyncio.sleep(0)

    async def produce(buffer: Buffer) -> None:
        while prompts := await buffer.grant(at_most):
            version = published[-1]
            assert all(prompt // B + 1 <= version + 1 + S for prompt in prompts)
            granted.extend(prompts)
            await pause()
            for prompt in dice.sample(prompts, len(prompts)):
                await buffer.put(prompt, [make_receipt(prompt, version=version)])
                await pause()

    async def learn(buffer: Buffer) -> None:
        for step in range(1, steps + 1):
            batch = await buffer.batch(step)
            trained.extend(prompts_of(batch))
            assert all(0 <= step - 1 - receipt.oldest_version <= S for receipt in batch.receipts)
            await pause()
            published.append(step)
            await buffer.advance(step)

    async def race() -> None:
        buffer = make_buffer(B=B, steps=steps, S=S)
        await asyncio.wait_for(asyncio.gather(learn(buffer), *[produce(buffer) for _ in range(producers)]), 10)
        assert buffer.num_waiting == 0

    asyncio.run(race())
    assert sorted(granted) == list(range(B * steps))
    assert trained == [f"train-{prompt}" for prompt in range(B * steps)]
