"""What bench.end_to_end makes of what it measured."""

from __future__ import annotations

import pytest

from bench.end_to_end import WARM_UP, compared, speed, steady


def test_a_step_lasts_until_the_next_ones_end_and_the_ends_of_a_run_do_not_count():
    steps = [{"time": 10.0 * n + (0.5 if n > 9 else 0.0), "tokens_trained": 100 * n} for n in range(1, 12)]
    found = steady(steps, 4)
    assert found == [(10.0, 100)] * 4
    assert len(steady(steps[: WARM_UP + 2], 4)) == 2


def test_the_median_step_gives_the_speed():
    assert speed([(1.0, 100), (2.0, 100), (50.0, 100)]) == 50


def test_runs_are_compared_with_their_stages_and_with_the_peer():
    alone = {
        "seconds": {"generate": [1.0], "score": [4.0], "train": [3.0]},
        "cpu_seconds": {"generate": [1.0], "score": [4.0], "train": [3.0]},
        "tokens": [4000],
    }
    laps = {"synchronous": 10.0, "asynchronous": 5.0, "asynchronous_2": 4.0}
    turn = {"alone": alone, **{mode: [(seconds, 4000)] for mode, seconds in laps.items()}}
    found = compared([turn], 1.6, {"trained_tokens_per_second": 200})
    assert found["tokens_per_second_alone"]["sum_of_stages"] == 500
    assert found["tokens_per_second_alone"]["slowest_stage"] == 1000
    assert found["synchronous_overhead"] == pytest.approx(0.2)
    assert found["asynchronous_of"] == {"slowest_stage": 0.8, "floor": 1.0, "chain": 0.8}
    assert found["asynchronous_2_of"] == {"slowest_stage": 1.0, "floor": 1.25, "chain": 1.0}
    assert found["of_trl"] == {"synchronous": 2, "asynchronous": 4, "asynchronous_2": 5}
