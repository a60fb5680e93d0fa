"""TAID's t: never back, never behind the straight line, never beyond its end, and the same after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.schedules import Schedules
from potstill.algebra.objective import Objective
from potstill.errors import ConfigError

TAID = {"kind": "taid", "start": 0.4, "end": 1.0, "rate": 5e-3, "momentum": 0.9}
STEPS = 1000
some_losses = st.lists(st.floats(min_value=1e-6, max_value=50), min_size=2, max_size=40)


def make_objective(**target: Any) -> Objective:
    """A main term with TAID, one auxiliary term without and one with another start."""
    full = {"support": "full", "loss": "forward_kl"}
    return Objective.model_validate(
        {
            **full,
            "target": {**TAID, **target},
            "auxiliaries": {"plain": full, "late": {**full, "target": {**TAID, "start": 0.7}}},
        }
    )


def run(losses: Sequence[float], *, steps: int = STEPS, **target: Any) -> list[float]:
    """t of the main term: before the first step, and after every step."""
    schedules = Schedules(make_objective(**target), steps)
    found = [schedules.values()["main"]]
    for step, loss in enumerate(losses, start=1):
        schedules.observe(step, {"main": loss, "plain": 9.0, "late": loss})
        found.append(schedules.values()["main"])
    return found


def test_only_terms_with_taid_have_a_value_and_begin_at_their_start() -> None:
    assert Schedules(make_objective(), STEPS).values() == {"main": 0.4, "late": 0.7}


def test_the_first_loss_is_only_remembered() -> None:
    assert run([3.0]) == [0.4, 0.4]


def test_t_follows_the_papers_formulas() -> None:
    t, m, previous, expected = 0.4, 0.0, 3.0, [0.4, 0.4]
    losses = [3.0, 2.0, 2.5, 0.5, 0.5]
    for n, loss in enumerate(losses[1:], start=2):
        m = 0.9 * m + 0.1 * (previous - loss) / previous
        rise = 5e-3 / (1 + math.exp(-m)) * (1 - t)
        t, previous = min(1.0, max(0.4 + 0.6 * n / STEPS, t + rise)), loss
        expected.append(t)
    assert run(losses) == pytest.approx(expected, rel=1e-12)


def test_while_the_loss_is_constant_t_rises_by_half_the_rate_times_what_is_left() -> None:
    found = run([2.0] * 50)
    for before, after in pairwise(found[1:]):
        assert after - before == pytest.approx(0.5 * 5e-3 * (1 - before), rel=1e-9)


def test_a_falling_loss_raises_t_faster_than_a_rising_one() -> None:
    falling, rising = [0.9**n for n in range(30)], [1.1**n for n in range(30)]
    assert run(falling)[-1] > run([1.0] * 30)[-1] > run(rising)[-1]


@given(losses=some_losses, start=st.floats(0.01, 0.5), end=st.floats(0.5, 1), rate=st.floats(1e-5, 1))
def test_t_never_falls_back_nor_behind_the_line_nor_beyond_its_end(
    losses: list[float], start: float, end: float, rate: float
) -> None:
    found = run(losses, steps=len(losses), start=start, end=end, rate=rate)
    assert found == sorted(found)
    assert found[-1] == pytest.approx(end, abs=1e-12)  # the line is there after the last step
    assert all(t <= end for t in found)
    for step, t in enumerate(found):
        assert step < 2 or t >= min(end, start + (end - start) * (step / len(losses)))


def test_a_loss_that_explodes_or_starts_at_zero_leaves_t_on_the_line() -> None:
    for losses in ([1e-300, 1e300, 1.0], [0.0, 1.0, 1.0]):
        assert run(losses)[-1] == pytest.approx(0.4 + 0.6 * 3 / STEPS)


def test_a_term_without_a_loss_waits() -> None:
    schedules = Schedules(make_objective(), STEPS)
    schedules.observe(1, {"main": 2.0})
    schedules.observe(2, {"main": 1.0})
    assert schedules.values()["main"] > 0.4
    assert schedules.values()["late"] == 0.7
    assert schedules.state()["late"]["previous"] is None


@given(losses=some_losses, data=st.data())
def test_a_resumed_schedule_gives_t_bit_for_bit(losses: list[float], data: st.DataObject) -> None:
    stop = data.draw(st.integers(1, len(losses)))
    through, resumed = Schedules(make_objective(), STEPS), Schedules(make_objective(), STEPS)
    for step, loss in enumerate(losses, start=1):
        through.observe(step, {"main": loss, "late": 2 * loss})
        if step == stop:
            resumed.load(json.loads(json.dumps(through.state())))
        elif step > stop:
            resumed.observe(step, {"main": loss, "late": 2 * loss})
    assert resumed.state() == through.state()
    assert resumed.values() == through.values()


def test_the_state_of_another_objective_is_refused() -> None:
    other = Objective.model_validate({"support": "full", "loss": "forward_kl", "target": TAID})
    with pytest.raises(ConfigError, match=r"schedules for \['main'\], the objective for \['late', 'main'\]"):
        Schedules(make_objective(), STEPS).load(Schedules(other, STEPS).state())


def test_an_objective_without_taid_has_no_schedule() -> None:
    schedules = Schedules(Objective.model_validate({"support": "full", "loss": "forward_kl"}), STEPS)
    schedules.observe(1, {"main": 1.0})
    assert schedules.values() == {}
    assert schedules.state() == {}
