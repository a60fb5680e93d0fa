"""The table of moves: what it allows, what it refuses, and that nothing ever leaves the end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.service.runs import MOVES, Run, State, category_of_exit, check_move, run_resource
from potstill.errors import ServiceError
from potstill.journal import Status

BEGINNING = [State.QUEUED, State.STARTING]
GOING_ON = [State.RUNNING, State.WAITING_TEACHER, State.RECOVERING]
ENDS = [State.SUCCEEDED, State.FAILED, State.CANCELLED]
ORDER = [*BEGINNING, *GOING_ON, State.CANCELLING, *ENDS]


def test_every_journal_status_is_a_state_and_cancelling_is_the_only_other():
    assert {state.value for state in State} - {status.value for status in Status} == {"cancelling"}
    assert {state.value for state in State if state.final} == {status.value for status in Status if status.final}


@pytest.mark.parametrize(("current", "wanted"), list(itertools.product(State, State)))
def test_a_run_moves_forward_among_what_may_come_again_or_not_at_all(current: State, wanted: State):
    """What comes again: a process is lost, or the teacher is away, and the run goes on. A lost one is started anew."""
    onward = current not in ENDS and ORDER.index(wanted) > ORDER.index(current)
    again = {current, wanted} <= set(GOING_ON) and current is not wanted
    anew = (current, wanted) == (State.RECOVERING, State.STARTING)
    if onward or again or anew:
        check_move("r", current, wanted)
        return
    with pytest.raises(ServiceError, match=f"run r is {current}") as caught:
        check_move("r", current, wanted)
    assert (caught.value.status, caught.value.code) == (409, "illegal_transition")


@given(st.lists(st.sampled_from(list(State)), max_size=20))
def test_no_sequence_of_moves_leaves_a_final_state_or_forgets_that_the_run_is_to_stop(wishes: list[State]):
    seen = [State.QUEUED]
    for wish in wishes:
        if wish in MOVES[seen[-1]]:
            check_move("r", seen[-1], wish)
            seen.append(wish)
    assert not any(state.final for state in seen[:-1])
    assert State.CANCELLING not in seen[:-2]
    assert State.QUEUED not in seen[1:]


@pytest.mark.parametrize(
    ("code", "category"),
    [(1, "system"), (2, "user"), (3, "teacher"), (-9, "system"), (137, "system"), (None, "system")],
)
def test_an_exit_code_says_whose_problem_it_is(code: int | None, category: str):
    assert category_of_exit(code) == category


def test_times_are_shown_in_utc_with_a_z():
    run = Run(
        id="r",
        state=State.RUNNING,
        config={},
        submission_id="s",
        created_at=0.5,
        started_at=None,
        finished_at=None,
        error=None,
    )
    shown = run_resource(run)
    assert (shown["created_at"], shown["started_at"], shown["status"]) == ("1970-01-01T00:00:00.500Z", None, "running")
