"""The breaker on a clock that a test turns by hand."""

from __future__ import annotations

import pytest

from potstill.calling.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock, *, failures: int = 3, cool_down_s: float = 10.0) -> Breaker:
    breaker = Breaker(failures_to_open=failures, cool_down_s=cool_down_s, clock=clock)
    for _ in range(failures):
        assert breaker.admit()
        breaker.failed()
    return breaker


def test_failures_in_a_row_open_it():
    breaker = opened(Clock())
    assert breaker.state == "open"
    assert not breaker.admit()
    assert breaker.open_for_s() == 10.0


def test_a_success_in_between_starts_the_count_anew():
    breaker = Breaker(failures_to_open=2, cool_down_s=10.0, clock=Clock())
    for verdict in (breaker.failed, breaker.succeeded, breaker.failed):
        verdict()
    assert breaker.state == "closed"
    breaker.failed()
    assert breaker.state == "open"


def test_after_the_cool_down_exactly_one_may_probe():
    clock = Clock()
    breaker = opened(clock)
    clock.now += 9.9
    assert not breaker.admit()
    clock.now += 0.1
    assert breaker.state == "half-open"
    assert [breaker.admit() for _ in range(3)] == [True, False, False]


def test_a_probe_that_succeeds_closes_it():
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    assert breaker.admit()
    breaker.succeeded()
    assert (breaker.state, breaker.failures) == ("closed", 0)
    assert all(breaker.admit() for _ in range(3))


def test_a_probe_that_fails_opens_it_for_another_cool_down():
    clock = Clock()
    breaker = opened(clock)
    clock.now += 15
    assert breaker.admit()
    breaker.failed()
    assert breaker.open_for_s() == 10.0
    assert not breaker.admit()


def test_a_probe_that_is_given_up_lets_the_next_one_probe():
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    assert breaker.admit()
    breaker.abandoned()
    assert breaker.admit()


def test_late_failures_of_requests_that_were_on_their_way_do_not_prolong_it():
    clock = Clock()
    breaker = opened(clock)
    clock.now += 4
    breaker.failed()
    assert breaker.open_for_s() == 6.0


def test_what_never_opens_is_refused():
    with pytest.raises(ValueError, match="failures_to_open"):
        Breaker(failures_to_open=0, cool_down_s=1.0, clock=Clock())
