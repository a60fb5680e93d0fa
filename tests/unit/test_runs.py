"""The table of moves: what it allows, what it refuses, and that nothing ever leaves the end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.service.runs import (
    MOVES,
    State,
    category_of_exit,
    check_move,
    config_resource,
    config_sha256,
    progress,
    run_resource,
)
from potstill.errors import ServiceError
from potstill.journal import Status
from tests.runs import run

BEGINNING = [State.QUEUED, State.STARTING]
GOING_ON = [State.RUNNING, State.WAITING_TEACHER, State.RECOVERING]
ASKED = [State.PAUSING, State.PAUSED, State.CANCELLING]
ENDS = [State.SUCCEEDED, State.FAILED, State.CANCELLED]
ORDER = [*BEGINNING, *GOING_ON, *ASKED, *ENDS]
NOT_ONWARD = {  # of what comes later in the order
    *((state, State.PAUSED) for state in (State.STARTING, State.RUNNING, State.WAITING_TEACHER)),  # it pauses first
    (State.PAUSED, State.SUCCEEDED),  # without a process it does nothing
    (State.PAUSED, State.FAILED),
}


def test_every_journal_status_is_a_state_and_what_was_asked_is_the_only_other():
    assert {state.value for state in State} - {status.value for status in Status} == {state.value for state in ASKED}
    assert {state.value for state in State if state.final} == {status.value for status in Status if status.final}


@pytest.mark.parametrize(("current", "wanted"), list(itertools.product(State, State)))
def test_a_run_moves_forward_among_what_may_come_again_or_not_at_all(current: State, wanted: State):
    """What comes again: a process is lost, or the teacher is away, and the run goes on; or it is paused and resumed."""
    onward = current not in ENDS and ORDER.index(wanted) > ORDER.index(current) and (current, wanted) not in NOT_ONWARD
    again = {current, wanted} <= set(GOING_ON) and current is not wanted
    anew = (current, wanted) in {(State.RECOVERING, State.STARTING), (State.PAUSED, State.QUEUED)}
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
    assert all(before is State.PAUSED for before, after in itertools.pairwise(seen) if after is State.QUEUED)


@pytest.mark.parametrize(
    ("code", "category"),
    [(1, "system"), (2, "user"), (3, "teacher"), (-9, "system"), (137, "system"), (None, "system")],
)
def test_an_exit_code_says_whose_problem_it_is(code: int | None, category: str):
    assert category_of_exit(code) == category


def test_times_are_shown_in_utc_with_a_z():
    shown = run_resource(run())
    assert (shown["created_at"], shown["started_at"], shown["status"]) == ("1970-01-01T00:00:00.500Z", None, "running")


def test_the_config_is_shown_with_the_names_that_its_client_used():
    resolved = {
        "student": {"model": "/srv/models/tiny", "dtype": "float32"},
        "teacher": {"kind": "server", "url": "http://inner:1", "secret_ref": "file:/run/x"},
        "runs": "/srv/runs",
    }
    submitted = {"student": {"model": "tiny"}, "teacher": {"kind": "registered", "name": "big"}}
    assert config_resource(run(config=resolved, submitted=submitted)) == {
        "student": {"model": "tiny", "dtype": "float32"},
        "teacher": {"kind": "registered", "name": "big"},
    }


def test_runs_that_differ_in_their_names_alone_have_one_digest():
    config = {"name": "a", "runs": "/srv/runs", "method": "opd", "loop": {"steps": 10}}
    assert config_sha256(config) == config_sha256({"loop": {"steps": 10}, **config, "name": "b", "runs": "/other"})
    assert config_sha256(config) != config_sha256(config | {"loop": {"steps": 11}})


def test_a_run_says_where_its_parts_are():
    links = run_resource(run("mine"))["links"]
    assert (links["html"], links["events"]) == ("/runs/mine", "/v1/runs/mine/events")


def test_how_far_a_run_is_and_when_it_will_be_done():
    begun = run(step=4, started_at=100.0, launched_at=90.0, heartbeat_at=120.0, latest={"tokens_trained": 7.0})
    assert progress(begun) == {
        "step": 4, "max_steps": 10, "percent": 40.0, "eta_seconds": 30.0, "tokens_trained": 7.0,
    }  # fmt: skip
    assert progress(run())["eta_seconds"] is None
