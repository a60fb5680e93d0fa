"""What the dashboard says before any page exists: times, sizes, buttons, differences, curves. Pure functions."""

import pytest

from orchestrator.service.dashboard.comparison import MOST, Column, asked_for, columns, differences
from orchestrator.service.dashboard.curves import CURVES, drawn
from orchestrator.service.dashboard.heading import Figure, actions
from orchestrator.service.dashboard.rows import GROUPS, short
from orchestrator.service.dashboard.viewing import sentence
from orchestrator.service.dashboard.words import ago, left, moment, size
from orchestrator.service.runs import MOVES, State
from potstill.metrics import METRICS

NOW = 1_764_000_000.0


@pytest.mark.parametrize(
    ("past", "words"),
    [
        (0, "just now"),
        (59, "just now"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (3600, "1 h ago"),
        (47 * 3600, "47 h ago"),
        (48 * 3600, "2 days ago"),
        (29.9 * 86400, "29 days ago"),
        (31 * 86400, "24 Oct 2025"),
        (-3, "just now"),
        (-600, "in 10 min"),
    ],
)
def test_a_time_is_said_as_people_say_it(past, words):
    assert ago(NOW - past, NOW) == words


def test_a_moment_keeps_its_exact_time_and_an_unknown_one_is_none():
    assert moment(NOW, NOW).exact == "2025-11-24T16:00:00Z"
    assert moment(None, NOW) is None


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (2_147_483_648, "2.15 GB"), (9e15, "9e+03 TB")],
)
def test_sizes_are_said_in_units_of_a_thousand(count, said):
    assert size(count) == said


def test_what_is_left_is_an_estimate_in_words():
    assert [left(seconds) for seconds in (5, 65, 7300)] == [
        "less than a minute left",
        "about 1 min left",
        "about 2 h left",
    ]


@pytest.mark.parametrize("state", State)
def test_every_button_is_a_move_that_the_service_allows(state):
    offered = set(actions(state))
    assert ("pause" in offered) == (State.PAUSING in MOVES[state])
    assert ("cancel" in offered) == (State.CANCELLING in MOVES[state])
    assert ("resume" in offered) == (state is State.PAUSED)
    assert ("retry" in offered) == (state in {State.FAILED, State.CANCELLED})
    assert ("delete" in offered) == state.final


def test_every_state_is_found_by_a_filter():
    assert {state for states in GROUPS.values() for state in states} == set(State)


def test_settings_are_the_same_or_differ_and_a_missing_one_is_no_value():
    one = {"name": "a", "optim": {"lr": 1e-4, "warmup": 10}, "method": "opd"}
    other = {"name": "b", "optim": {"lr": 2e-4, "warmup": 10}, "method": "opd", "seed": 1}
    found, alike = differences([one, other])
    assert [(row.setting, *row.values) for row in found] == [("optim.lr", "0.0001", "0.0002"), ("seed", "–", "1")]
    assert alike == 2


def test_a_number_that_one_run_lacks_still_has_its_column():
    kl = Figure(label="Reverse KL", value="0.1", unit="nats/token")
    entropy = Figure(label="Entropy", value="0.9", unit="nats/token")
    assert columns([[kl], [kl, entropy]]) == [
        Column(label="Reverse KL", unit="nats/token", values=["0.1", "0.1"]),
        Column(label="Entropy", unit="nats/token", values=["–", "0.9"]),
    ]


def test_runs_are_named_by_commas_or_one_by_one_each_once():
    assert asked_for(["a,b", " c ", "a", ""]) == ["a", "b", "c"]
    assert len(asked_for([str(n) for n in range(20)])) == MOST


def test_only_what_was_measured_is_drawn_and_the_text_of_others_is_called_so():
    found = drawn({"reverse_kl", "entropy"})
    assert [(curve.name, [line.key for line in curve.lines]) for curve in found] == [
        ("reverse_kl", ["reverse_kl"]),
        ("entropy", ["entropy"]),
    ]
    assert drawn({"accuracy"})[0].lines[0].label == "own rollouts"
    assert drawn({"accuracy"}, own_text=False)[0].lines[0].label == "the text it reads"


def test_every_line_is_a_number_that_runs_report():
    assert {line.key for curve in CURVES for line in curve.lines} <= set(METRICS)


@pytest.mark.parametrize(
    ("name", "said"), [("org/model-7b", "model-7b"), ("model", "model"), ("a/b/", "b"), ("/", "/")]
)
def test_a_long_name_is_shortened_to_its_last_part(name, said):
    assert short(name) == said


def test_a_refusal_is_a_sentence():
    assert sentence("there is no such run") == "There is no such run."
    assert sentence("Done!") == "Done!"
