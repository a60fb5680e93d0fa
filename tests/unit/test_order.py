"""What may be begun and what makes a batch, by each of the two orders. B: prompts per step, S: max_staleness."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.order import AsFinished, InOrder, order_of
from potstill.config import LoopConfig


@pytest.mark.parametrize(
    ("chunk", "worker", "allowed"),
    [
        (range(2), 0, True),
        (range(2, 4), 0, True),  # step 2 is made at version 1, and S is 1
        (range(4, 6), 0, False),
        (range(4, 6), 1, True),
        (range(4, 5), 0, False),
    ],
)
def test_in_order_a_worker_begins_what_its_weights_are_new_enough_for(chunk: range, worker: int, allowed: bool):
    order = InOrder(prompts_per_step=2, max_staleness=1)
    assert order.may_start(chunk, worker=worker, taken=5, started=99) is allowed


def test_in_order_a_step_is_its_own_prompts_or_not_ready():
    order = InOrder(prompts_per_step=2, max_staleness=1)
    assert list(order.choose(2, {5, 3, 2}) or ()) == [2, 3]
    assert order.choose(2, {0, 1, 2, 4, 5}) is None


@pytest.mark.parametrize(
    ("worker", "taken", "started", "allowed"),
    [(3, 4, 0, True), (2, 4, 0, False), (4, 4, 8, True), (4, 4, 9, False)],
)
def test_as_finished_a_worker_begins_until_there_is_enough(worker: int, taken: int, started: int, allowed: bool):
    order = AsFinished(prompts_per_step=4, max_staleness=1, oversample=0.5)
    assert order.may_start(range(90, 92), worker=worker, taken=taken, started=started) is allowed


def test_as_finished_a_step_is_the_first_prompts_of_those_that_are_ready():
    order = AsFinished(prompts_per_step=2, max_staleness=1, oversample=0.0)
    assert order.choose(1, {9, 4, 7}) == [4, 7]
    assert order.choose(1, {9}) is None


@given(B=st.integers(1, 8), S=st.integers(0, 4), step=st.integers(1, 20))
def test_what_is_in_order_allowed_is_never_too_old_when_its_turn_comes(B: int, S: int, step: int):
    """And it could not be allowed any earlier."""
    order = InOrder(B, S)
    last = range(step * B - 1, step * B)
    allowed = [worker for worker in range(step + 1) if order.may_start(last, worker=worker, taken=0, started=0)]
    assert allowed == list(range(max(0, step - 1 - S), step + 1))


def test_the_config_says_which():
    assert order_of(LoopConfig(steps=1, max_staleness=2), 3) == InOrder(3, 2)
    finish = LoopConfig(steps=1, max_staleness=2, order="finish", oversample=0.5)
    assert order_of(finish, 3) == AsFinished(3, 2, 0.5)
