"""Who is scored next, when a batch begins, and what leaves the queue unscored."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.errors import TeacherUnavailable, WeightsError
from potstill.types import ScoreStatus, TeacherScores
from potstill.wire import Ask
from teacher_server.batching import BatchReport, Job, QueueFull, ScoringQueue
from teacher_server.turns import Turns
from tests.builders_teacher import IDENTITY

WINDOW_S = 0.2
LATER = 30.0


def job(name: int, tokens: int = 10) -> Job:
    """Jobs of one name have one context; a completion of one token, so that `tokens` are all read."""
    return Job(
        input_ids=np.full(tokens, name, np.int32),
        completion_ids=np.array([name], np.int32),
        token_ids=None,
        ask=Ask(),
        seed=0,
    )


@dataclass
class Gate:
    """A model that scores one batch each time it is opened, and remembers which jobs were in it."""

    open: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    batches: list[list[int]] = field(default_factory=list)

    def score(self, jobs: Sequence[Job]) -> list[TeacherScores]:
        self.batches.append([int(one.completion_ids[0]) for one in jobs])
        self.entered.release()
        self.open.acquire()
        return [TeacherScores(status=ScoreStatus.OK, identity=IDENTITY, sampled=np.zeros(1, np.float32)) for _ in jobs]


@contextmanager
def queue(
    gate: Gate, *, capacity: int = 10_000, batch_tokens: int = 40, window_s: float = 0.0
) -> Iterator[ScoringQueue]:
    made = ScoringQueue(gate.score, capacity=capacity, batch_tokens=batch_tokens, window_s=window_s)
    try:
        yield made
    finally:
        gate.open.release(1000)
        made.close()


def submit(made: ScoringQueue, *jobs: Job, seconds: float = LATER) -> list[object]:
    return made.submit(jobs, deadline=time.monotonic() + seconds)


# ---------------------------------------------------------------------------------------------------------- turns


def by_hand(lanes: list[list[tuple[int, int]]], room: int) -> list[list[tuple[int, int]]]:
    """Rounds, dealt the slow way: one of each lane in turn, a round full when the next would not fit."""
    rounds: list[list[tuple[int, int]]] = [[]]
    lanes, left = [list(lane) for lane in lanes if lane], room
    while lanes:
        first, *others = lanes
        if rounds[-1] and first[0][1] > left:
            rounds.append([])
            left = room
        rounds[-1].append(first[0])
        left -= first[0][1]
        lanes = others + ([first[1:]] if first[1:] else [])
    return rounds


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5), st.integers(1, 20))
def test_rounds_are_those_dealt_by_hand(sizes, room):
    lanes = [[(100 * lane + place, size) for place, size in enumerate(items)] for lane, items in enumerate(sizes)]
    turns: Turns[tuple[int, int], str] = Turns()
    for lane in lanes:
        turns.add(lane)
    dealt = []
    while turns:
        dealt.append(turns.deal(room, lambda item: item[1]))
    assert dealt == [one for one in by_hand(lanes, room) if one]


def test_nothing_passes_a_barrier_and_what_left_is_not_dealt():
    turns: Turns[str, str] = Turns()
    turns.add(["a1", "a2", "a3"])
    turns.add_barrier("new weights")
    turns.add(["b1"])
    turns.add_barrier("newer weights")
    turns.discard("a2")
    assert turns.pass_barrier() is None
    assert turns.deal(100, len) == ["a1", "a3"]
    assert turns.deal(100, len) == []
    assert (turns.pass_barrier(), turns.deal(100, len)) == ("new weights", ["b1"])
    assert (turns.pass_barrier(), turns.pass_barrier(), bool(turns)) == ("newer weights", None, False)


def test_a_lane_that_left_altogether_leaves_nothing_behind():
    turns: Turns[int, str] = Turns()
    for item in range(1000):
        turns.add([item])
        turns.discard(item)
    assert not turns
    assert turns.clear() == ([], [])


# ---------------------------------------------------------------------------------------------------------- queue


def test_a_huge_request_delays_a_small_one_by_no_more_than_the_batch_being_scored():
    gate = Gate()
    with queue(gate) as made:
        huge = submit(made, *(job(n) for n in range(100)))  # 25 batches of 4
        assert gate.entered.acquire(timeout=5)
        (small,) = submit(made, job(500))
        gate.open.release(2)
        small.result(timeout=5)
        assert sum(future.done() for future in huge) <= 8
        assert len(gate.batches[0]) == 4
        assert 500 in gate.batches[1]


def test_a_batch_is_shared_evenly_by_the_requests_that_wait():
    gate = Gate()
    with queue(gate) as made:
        submit(made, job(0, tokens=40))
        assert gate.entered.acquire(timeout=5)
        for first in (100, 200):
            submit(made, *(job(first + n) for n in range(10)))
        gate.open.release(1)
        assert gate.entered.acquire(timeout=5)
        assert sorted(gate.batches[1]) == [100, 101, 200, 201]


def test_jobs_of_one_context_count_it_once_and_are_scored_together():
    gate = Gate()
    with queue(gate) as made:
        submit(made, *(job(7) for _ in range(20)))
        assert gate.entered.acquire(timeout=5)
        assert len(gate.batches[0]) > 4


def test_an_idle_machine_waits_for_company_but_never_longer_than_its_window():
    gate = Gate()
    gate.open.release(10)
    with queue(gate, window_s=WINDOW_S) as made:
        started = time.monotonic()
        first = submit(made, job(1))
        second = submit(made, job(2))
        assert gate.entered.acquire(timeout=5)
        assert WINDOW_S <= time.monotonic() - started < 3 * WINDOW_S
        assert gate.batches == [[1, 2]]
        for future in (*first, *second):
            assert future.result(timeout=5)


def test_a_full_batch_does_not_wait_for_the_window():
    gate = Gate()
    with queue(gate, window_s=LATER) as made:
        submit(made, *(job(n) for n in range(4)))
        assert gate.entered.acquire(timeout=5)


def test_a_busy_machine_takes_the_next_batch_without_a_window():
    gate = Gate()
    with queue(gate, batch_tokens=10, window_s=LATER) as made:
        submit(made, job(1))
        assert gate.entered.acquire(timeout=5)
        submit(made, job(2, tokens=3))
        gate.open.release(1)
        assert gate.entered.acquire(timeout=5)


def test_what_waited_past_its_deadline_is_dropped_and_not_scored():
    gate = Gate()
    with queue(gate, batch_tokens=10) as made:
        submit(made, job(1))
        assert gate.entered.acquire(timeout=5)
        (late,) = submit(made, job(2), seconds=0.01)
        (patient,) = submit(made, job(3))
        time.sleep(0.02)
        gate.open.release(2)
        patient.result(timeout=5)
        assert late.cancelled()
        assert gate.batches == [[1], [3]]
        assert made.tokens == 0


def test_a_cancelled_job_makes_room_at_once():
    gate = Gate()
    with queue(gate, capacity=20, batch_tokens=10) as made:
        submit(made, job(1))
        assert gate.entered.acquire(timeout=5)
        (left,) = submit(made, job(2))
        with pytest.raises(QueueFull):
            submit(made, job(3))
        left.cancel()
        assert made.tokens == 10
        submit(made, job(3))


def test_a_barrier_stands_between_what_came_before_and_what_comes_after():
    gate = Gate()
    gate.open.release(100)
    seen: list[int] = []
    with queue(gate, batch_tokens=10) as made:
        before = submit(made, *(job(n) for n in range(5)))
        done = made.between(lambda: seen.append(len(gate.batches)))
        after = submit(made, *(job(10 + n) for n in range(5)))
        for future in (*before, *after):
            future.result(timeout=5)
        done.result(timeout=5)
        assert seen == [5]
        assert [batch[0] for batch in gate.batches] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def test_a_barrier_that_refuses_harms_nobody():
    def refuse() -> None:
        raise WeightsError("of another shape")

    gate = Gate()
    gate.open.release(100)
    with queue(gate) as made:
        with pytest.raises(WeightsError):
            made.between(refuse).result(timeout=5)
        submit(made, job(1))[0].result(timeout=5)
        assert made.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_thread_ends_by_an_error_all_who_wait_are_told():
    gate = Gate()
    with queue(gate, batch_tokens=10) as made:
        submit(made, job(1))
        assert gate.entered.acquire(timeout=5)
        broken = made.between(lambda: 1 / 0)
        (waiting,) = submit(made, job(2))
        gate.open.release(1)
        with pytest.raises(TeacherUnavailable):
            broken.result(timeout=5)
        assert waiting.result(timeout=5) is None
        assert not made.alive
        with pytest.raises(QueueFull):
            submit(made, job(3))


def test_every_batch_is_reported_with_how_long_its_jobs_waited():
    gate = Gate()
    reports: list[BatchReport] = []
    with queue(gate, batch_tokens=10) as made:
        made.watch(reports.append)
        submit(made, job(1))
        assert gate.entered.acquire(timeout=5)
        (second,) = submit(made, job(2, tokens=9))
        time.sleep(0.05)
        gate.open.release(2)
        second.result(timeout=5)
    assert [(report.num_jobs, report.num_tokens) for report in reports] == [(1, 10), (1, 9)]
    assert reports[0].waits_s[0] < 0.05 <= min(reports[1].waits_s[0], reports[0].compute_s)
