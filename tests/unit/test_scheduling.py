"""Who may start, who must wait, who must stop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.service.principals import Limits
from orchestrator.service.runs import State
from orchestrator.service.scheduling import Usage, admit, at_limit, exhausted, overspent, starting
from potstill.errors import ServiceError
from tests.runs import run


def names(runs):
    return [one.id for one in runs]


def queued(id: str, *, key: str = "a", priority: int = 0, created: float = 0.0):
    return run(id, State.QUEUED, key_id=key, priority=priority, created_at=created)


def test_the_highest_priority_starts_first_then_the_oldest():
    waiting = [queued("late", created=2.0), queued("urgent", priority=5, created=3.0), queued("early", created=1.0)]
    assert names(starting(waiting, [], {}, slots=None)) == ["urgent", "early", "late"]
    assert names(starting(waiting, [run("busy")], {}, slots=2)) == ["urgent"]


def test_a_key_at_its_limit_holds_nobody_else_up():
    waiting = [queued("a1", priority=9), queued("a2", priority=9), queued("b1", key="b")]
    limits = {"a": Limits(running=1), "b": Limits()}
    assert names(starting(waiting, [], limits, slots=None)) == ["a1", "b1"]
    assert names(starting(waiting, [run("a0", key_id="a")], limits, slots=None)) == ["b1"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 3)), max_size=12),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
    st.integers(0, 6),
)
def test_no_limit_is_ever_crossed(wishes: list[tuple[str, int]], most: dict[str, int], slots: int):
    waiting = [queued(f"r{n}", key=key, priority=priority) for n, (key, priority) in enumerate(wishes)]
    limits = {key: Limits(running=count) for key, count in most.items()}
    chosen = starting(waiting, [], limits, slots=slots)
    assert len(chosen) <= slots
    for key, count in most.items():
        assert sum(one.key_id == key for one in chosen) <= count
    left = [one for one in waiting if one not in chosen]
    if len(chosen) < slots:  # whoever waits although there is room has a key at its limit
        for one in left:
            assert sum(other.key_id == one.key_id for other in chosen) == most[one.key_id]


@pytest.mark.parametrize("limit", ["runs", "unfinished", "gpu_hours", "teacher_tokens", "teacher_usd"])
def test_a_key_whose_limit_is_reached_submits_nothing_more(limit: str):
    used = Usage(runs=2, unfinished=2, running=0, gpu_hours=2.0, teacher_tokens=2, teacher_usd=2.0)
    admit(used, Limits(**{limit: 3}))
    with pytest.raises(ServiceError, match=limit) as caught:
        admit(used, Limits(**{limit: 2}))
    assert (caught.value.status, caught.value.code) == (429, "quota_exceeded")


def test_runs_stop_when_the_budget_of_their_key_is_used_up_and_not_twice():
    used = {"a": Usage(runs=1, unfinished=1, running=1, gpu_hours=3.5, teacher_tokens=0, teacher_usd=0.0)}
    limits = {"a": Limits(gpu_hours=3.0)}
    active = [run("on"), run("stops", State.PAUSING), run("other", key_id="b")]
    assert [(one.id, how) for one, how in overspent(active, used, limits)] == [("on", "3.5 of 3 gpu_hours")]
    assert exhausted(used["a"], Limits()) == []


def test_a_key_is_at_its_limit_when_it_has_as_many_runs_at_work_as_it_may():
    active = [run("a1"), run("a2"), run("b1", key_id="b")]
    limits = {"a": Limits(running=2), "b": Limits(running=2), "c": Limits(running=0), "d": Limits()}
    assert at_limit(active, limits) == {"a", "c"}
