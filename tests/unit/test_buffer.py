"""What a worker is given to write, and what a step is made of. S: max_staleness, B: prompts per step, C: per call."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.buffer import Closed
from potstill.errors import RunError, SignalLost
from potstill.types import Receipt
from tests.buffers import hold, leased, make_buffer, prompts_of, turns, waits, write
from tests.receipts import make_receipt


async def test_with_no_staleness_nothing_is_leased_before_the_worker_holds_the_steps_own_weights():
    buffer, version = make_buffer(B=2, S=0), 0
    assert await write(buffer) == range(2)
    waiting = await waits(leased(buffer))
    moving = await waits(leased(buffer, lambda: version))
    await buffer.batch(1)
    buffer.advance(1)
    await turns()
    assert not moving.done()
    version = 1
    buffer.worker_moved()
    assert await moving == range(2, 4)
    assert not waiting.done()
    waiting.cancel()


async def test_with_staleness_one_the_next_step_is_leased_and_no_more():
    buffer = make_buffer(B=2, S=1)
    assert [await write(buffer), await write(buffer)] == [range(2), range(2, 4)]
    (await waits(leased(buffer))).cancel()


@pytest.mark.parametrize(
    ("B", "C", "chunks"),
    [
        (4, 4, [range(4), range(4, 8)]),
        (4, 9, [range(4), range(4, 8)]),
        (4, 3, [range(3), range(3, 4), range(4, 7), range(7, 8)]),
        (4, 1, [range(n, n + 1) for n in range(8)]),
    ],
)
async def test_chunks_are_the_same_in_every_run_and_never_of_two_steps(B: int, C: int, chunks: list[range]):
    buffer = make_buffer(B=B, C=C, S=1, steps=2)
    assert [await write(buffer) for _ in chunks] == chunks
    (await waits(leased(buffer))).cancel()


async def test_a_chunk_that_is_given_back_is_the_next_one_whole():
    buffer = make_buffer(B=4, C=2, S=1)
    (first, one), (second, other) = await hold(buffer), await hold(buffer)
    first.fail()
    with pytest.raises(OSError, match="broken"):
        await one
    other.cancel()
    with pytest.raises(asyncio.CancelledError):
        await other
    assert [await write(buffer) for _ in range(3)] == [range(2), range(2, 4), range(4, 6)]
    assert (first.ended, second.ended) == ([], [])


async def test_a_chunk_that_is_given_back_wakes_who_waits_for_one():
    buffer = make_buffer(B=2, steps=1)
    holder, writing = await hold(buffer)
    waiting = await waits(leased(buffer))
    holder.fail()
    assert await waiting == range(2)
    with pytest.raises(OSError, match="broken"):
        await writing


async def test_a_waiting_worker_that_is_cancelled_takes_nothing_with_it():
    buffer = make_buffer(B=2, steps=1)
    holder, writing = await hold(buffer)
    waiting = await waits(leased(buffer))
    waiting.cancel()
    await turns()
    holder.finish()
    await writing
    assert len((await buffer.batch(1)).receipts) == 2


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[make_receipt(0, version=5)]], "prompts 0 to 1: some came back without a completion"),
        ([[make_receipt(0, version=5)], []], "prompts 0 to 1: some came back without a completion"),
        ([[make_receipt(0, version=5)], [make_receipt(1, version=4)]], "prompts 0 to 1 are older than version 5"),
    ],
)
async def test_what_cannot_have_been_leased_is_refused(groups: list[list[Receipt]], message: str):
    buffer = make_buffer(B=2, S=9)
    async with buffer.lease(lambda: 5) as chunk:
        with pytest.raises(RunError, match=message):
            buffer.put(chunk, groups)
        assert buffer.num_waiting == 0


async def test_handing_in_without_a_lease_or_twice_is_refused():
    buffer = make_buffer(B=1)
    groups = [[make_receipt(0)]]
    with pytest.raises(RunError, match="prompts 0 to 0 were handed in without a lease"):
        buffer.put(range(1), groups)
    async with buffer.lease(lambda: 0) as chunk:
        buffer.put(chunk, groups)
        with pytest.raises(RunError, match="without a lease"):
            buffer.put(chunk, groups)
    with pytest.raises(RunError, match="without a lease"):
        buffer.put(chunk, groups)
    assert buffer.num_waiting == 1


async def test_a_batch_is_in_prompt_order_whatever_the_order_of_arrival():
    buffer = make_buffer(B=3, C=1)
    holders = [await hold(buffer) for _ in range(3)]
    waiting = await waits(buffer.batch(1))
    for number in (2, 0, 1):
        holders[number][0].finish()
        await holders[number][1]
    batch = await waiting
    assert prompts_of(batch) == ["train-0", "train-1", "train-2"]
    assert (batch.step, batch.num_loss_tokens, batch.num_sequences, batch.oldest_version) == (1, 15, 3, 0)
    assert buffer.num_waiting == 0


async def test_all_completions_of_a_prompt_are_of_one_batch():
    buffer = make_buffer(B=1)
    async with buffer.lease(lambda: 0) as chunk:
        buffer.put(chunk, [[make_receipt(0, sample=sample) for sample in (0, 1, 2)]])
    assert [r.rollout_id for r in (await buffer.batch(1)).receipts] == ["train-0/0", "train-0/1", "train-0/2"]


async def test_what_arrives_early_for_the_next_step_waits_for_it():
    buffer = make_buffer(B=1, S=1)
    _, writing = await hold(buffer)
    await write(buffer)
    (await waits(buffer.batch(1))).cancel()
    assert buffer.num_waiting == 1
    writing.cancel()


async def test_as_finished_a_step_trains_the_first_that_are_there_and_writes_more_than_it_needs():
    buffer = make_buffer(B=2, C=1, order="finish", oversample=1.0)
    slow, writing = await hold(buffer)
    assert [await write(buffer) for _ in range(2)] == [range(1, 2), range(2, 3)]
    assert prompts_of(await buffer.batch(1)) == ["train-1", "train-2"]
    assert slow.ended == []
    writing.cancel()


async def test_as_finished_a_worker_goes_on_as_soon_as_the_learner_has_taken_a_batch():
    buffer = make_buffer(B=2, C=2, S=1, order="finish")
    await write(buffer), await write(buffer)
    waiting = await waits(leased(buffer))
    await buffer.batch(1)
    assert await waiting == range(4, 6)


async def test_as_finished_without_staleness_nothing_is_begun_while_a_step_is_made():
    buffer, version = make_buffer(B=2, C=2, S=0, order="finish"), 0
    await write(buffer)
    waiting = asyncio.create_task(leased(buffer, lambda: version))
    await buffer.batch(1)
    await turns()
    assert not waiting.done()
    version = 1
    buffer.advance(1)
    assert await waiting == range(2, 4)


async def test_as_finished_no_more_is_begun_than_steps_and_oversampling_ask_for():
    buffer = make_buffer(B=2, C=1, order="finish", oversample=0.5)
    holders = [await hold(buffer) for _ in range(3)]
    (await waits(leased(buffer))).cancel()
    for _, writing in holders:
        writing.cancel()


async def test_text_that_the_student_did_not_write_has_no_age():
    buffer = make_buffer(B=1, steps=9, version=5)
    async with buffer.lease(lambda: 5) as chunk:
        buffer.put(chunk, [[make_receipt(5, version=-1)]])
    assert prompts_of(await buffer.batch(6)) == ["train-5"]


async def test_too_many_unscored_tokens_lose_the_signal():
    buffer = make_buffer(B=2, unscored=0.1)
    async with buffer.lease(lambda: 0) as chunk:
        buffer.put(chunk, [[make_receipt(0, tokens=10, unscored=3)], [make_receipt(1, tokens=10)]])
    with pytest.raises(SignalLost, match=r"step 1: 3 of 20 loss tokens have no teacher's score; .* allows 10%"):
        await buffer.batch(1)


async def test_a_few_unscored_tokens_leave_the_denominator():
    buffer = make_buffer(B=3, unscored=0.5)
    async with buffer.lease(lambda: 0) as chunk:
        buffer.put(chunk, [[make_receipt(n, tokens=10, unscored=unscored)] for n, unscored in enumerate((10, 1, 0))])
    batch = await buffer.batch(1)
    assert (batch.num_loss_tokens, batch.num_sequences) == (19, 2)


async def test_a_step_without_a_single_scored_token_is_no_step():
    buffer = make_buffer(B=1, unscored=0.99)
    await write(buffer, tokens=1, unscored=1)
    with pytest.raises(SignalLost):
        await buffer.batch(1)


async def test_a_run_that_is_asked_to_stop_gives_no_more_batches():
    buffer = make_buffer(B=2)
    waiting = await waits(buffer.batch(1))
    buffer.close()
    with pytest.raises(Closed):
        await waiting
    await write(buffer)
    with pytest.raises(Closed):
        await buffer.batch(1)
    assert buffer.trained == []


async def test_a_resumed_run_begins_with_its_versions_first_prompt():
    buffer = make_buffer(B=4, steps=3, version=2)
    assert await write(buffer, version=2) == range(8, 12)
    assert buffer.trained == [range(8)]
    (await waits(leased(buffer, lambda: 2))).cancel()


async def test_what_was_scored_before_is_not_written_again():
    buffer = make_buffer(B=4, C=4, S=1, steps=3, version=1)
    found = {prompt: [make_receipt(prompt, version=1)] for prompt in (2, 4, 5, 8, 99)}
    assert buffer.refill(found) == 3
    assert [await write(buffer, version=1) for _ in range(2)] == [range(6, 8), range(9, 12)]
    assert prompts_of(await buffer.batch(2)) == [f"train-{n}" for n in range(4, 8)]


async def test_a_gap_between_what_was_scored_is_filled_with_its_own_calls():
    buffer = make_buffer(B=4, C=4, S=1, steps=1)
    buffer.refill({1: [make_receipt(1)]})
    assert [await write(buffer) for _ in range(2)] == [range(1), range(2, 4)]
    assert prompts_of(await buffer.batch(1)) == [f"train-{n}" for n in range(4)]


async def test_of_what_was_scored_before_the_old_is_written_anew():
    buffer = make_buffer(B=2, S=1, steps=9, version=5)
    assert buffer.refill({10: [make_receipt(10, version=4)], 11: [make_receipt(11, version=3)]}) == 1
    assert await write(buffer, version=5) == range(11, 12)


async def test_which_prompts_are_trained_is_kept_as_ranges():
    buffer = make_buffer(B=2, C=1, order="finish", oversample=1.0, steps=9, trained=[0, 1, 4, 7], version=2)
    assert buffer.trained == [range(2), range(4, 5), range(7, 8)]
    holder, writing = await hold(buffer, 2)
    assert [await write(buffer, version=2), await write(buffer, version=2)] == [range(3, 4), range(5, 6)]
    await buffer.batch(3)
    assert buffer.trained == [range(2), range(3, 6), range(7, 8)]
    assert holder.chunk == range(2, 3)
    writing.cancel()
