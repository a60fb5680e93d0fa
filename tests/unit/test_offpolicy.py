"""DistiLLM's schedule: φ rises only when validation worsens, and decides how much text is new, replayed or given."""

from __future__ import annotations

import json

import pytest

from orchestrator.offpolicy import OffPolicy

STEPS = 20_000


def make_schedule(*, num_rises: int = 0, items: int = 5, **options: object) -> OffPolicy:
    schedule = OffPolicy(**{"steps": STEPS, "seed": 0, **options})  # type: ignore[arg-type]
    for item in range(items):
        schedule.add(item)
    for loss in range(num_rises + 1):
        schedule.validated(float(loss))
    return schedule


def sources(schedule: OffPolicy) -> list[str]:
    return [schedule.source(step) for step in range(1, STEPS + 1)]


def test_until_validation_worsens_all_text_is_given() -> None:
    assert set(sources(make_schedule())) == {"given"}


def test_the_share_rises_only_when_the_loss_rises_by_more_than_the_tolerance() -> None:
    schedule = OffPolicy(steps=10, seed=0, rises=4, tolerance=0.5)
    found = []
    for loss in (1.0, 1.5, 2.1, 0.3, 0.9, 0.9, 0.2):
        schedule.validated(loss)
        found.append(schedule.share)
    assert found == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.5]


def test_the_share_ends_at_one_exactly() -> None:
    shares = [make_schedule(num_rises=n).share for n in range(13)]
    assert shares == sorted(shares)
    assert shares[9:] == [0.9, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("num_rises", [2, 7, 10])
def test_text_is_new_and_the_students_as_often_as_expected(num_rises: int) -> None:
    """E[new] is the mean of φ(1 − t/T), E[new or replayed] is φ."""
    share, found = num_rises / 10, sources(make_schedule(num_rises=num_rises))
    deviation = 0.5 / STEPS**0.5
    new = sum(share * (1 - t / STEPS) for t in range(STEPS)) / STEPS
    assert found.count("new") / STEPS == pytest.approx(new, abs=4 * deviation)
    assert 1 - found.count("given") / STEPS == pytest.approx(share, abs=4 * deviation)


def test_new_text_becomes_rarer() -> None:
    found = sources(make_schedule(num_rises=10))
    quarter = STEPS // 4
    counts = [found[start : start + quarter].count("new") for start in range(0, STEPS, quarter)]
    assert counts == sorted(counts, reverse=True)


def test_an_empty_buffer_is_not_replayed() -> None:
    assert set(sources(make_schedule(num_rises=5, items=0))) == {"new", "given"}


def test_the_buffer_forgets_the_oldest_first() -> None:
    schedule = make_schedule(items=1003)
    assert sorted(schedule.draw(1, 1000)) == list(range(3, 1003))


def test_draws_differ_from_step_to_step_and_are_refused_when_too_many() -> None:
    schedule = make_schedule(items=50)
    assert schedule.draw(1, 5) != schedule.draw(2, 5)
    assert len(set(schedule.draw(3, 50))) == 50
    with pytest.raises(ValueError, match="larger than population"):
        schedule.draw(1, 51)


def test_a_resumed_schedule_decides_and_draws_the_same() -> None:
    through = make_schedule(num_rises=6, items=30, capacity=20)
    resumed = make_schedule(items=0, capacity=20)
    resumed.load(json.loads(json.dumps(through.state())))
    for schedule in (through, resumed):
        schedule.validated(99.0)
        schedule.add("last")
    assert resumed.state() == through.state()
    assert sources(resumed) == sources(through)
    assert [resumed.draw(step, 3) for step in range(9)] == [through.draw(step, 3) for step in range(9)]
