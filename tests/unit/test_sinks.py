"""Sinks: what they are told, and that none of them hurts, slows or stops the run that tells them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.config_sinks import SinksConfig
from potstill.errors import ConfigError
from potstill.journal import Journal, Status, read_jsonl
from potstill.references import Stands, references
from potstill.sinks.feed import Feed
from potstill.sinks.kept import keep_id, kept_id
from potstill.sinks.mlflow import key_of, leaves
from potstill.sinks.opening import Ready, ready, require, told
from potstill.sinks.sink import Ending, Note, Rewind, Step
from tests.sinks import (
    CANARY,
    Broken,
    Closed,
    Hanging,
    Losing,
    Recording,
    Refusing,
    Slow,
    ending,
    facts_of,
    make_config,
    step,
    tell,
    three_steps,
    wait_until,
)


def events(folder: Path, type: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "events.jsonl") if event["type"] == type]


# ------------------------------------------------------------------------------------------------- what they are told


def test_every_finite_number_of_a_step_is_told_and_a_missing_one_is_not_zero(tmp_path: Path):
    sink = Recording()
    tell(tmp_path, sink, lambda journal: journal.metrics(1, {"loss": 0.5, "accuracy": math.nan, "lr": 0.0}))
    assert [(record.step, dict(record.values)) for record in sink.taken if isinstance(record, Step)] == [
        (1, {"loss": 0.5, "lr": 0.0})
    ]


def test_evaluations_are_points_of_curves_at_their_steps(tmp_path: Path):
    sink = Recording()

    def work(journal: Journal) -> None:
        journal.event("eval.finished", "half", stage="before", step=0, accuracy=0.5)
        journal.event("eval.finished", "most", stage="teacher", step=0, accuracy=0.9)
        journal.event("eval.finished", "none could be judged", stage="between", step=7, accuracy=math.nan)
        journal.event("validation.finished", "1.5", step=7, loss=1.5, share=0.5)

    tell(tmp_path, sink, work)
    assert [(record.step, dict(record.values)) for record in sink.taken if isinstance(record, Step)] == [
        (0, {"held_out_accuracy": 0.5}), (0, {"held_out_accuracy_teacher": 0.9}), (7, {"held_out_loss": 1.5}),
    ]  # fmt: skip


def test_warnings_and_errors_are_told_as_text_and_nothing_else_is(tmp_path: Path):
    sink = Recording()

    def work(journal: Journal) -> None:
        journal.metrics(4, {"loss": 1.0})
        journal.event("weights.published", "version 4")
        journal.event("alarm.length", "answers grow", level="warn")
        journal.event("run.failed", "the disk is full", level="error")

    tell(tmp_path, sink, work)
    assert [(n.step, n.level, n.type, n.message) for n in sink.taken if isinstance(n, Note)] == [
        (4, "warn", "alarm.length", "answers grow"),
        (4, "error", "run.failed", "the disk is full"),
    ]


def test_the_config_is_told_once_with_secrets_as_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_KEY", CANARY)
    sink = Recording()
    tell(
        tmp_path, sink, three_steps, trackio={"project": "p", "url": "http://127.0.0.1:1", "secret_ref": "env:SOME_KEY"}
    )
    (facts,) = sink.opened
    assert facts.config["sinks"]["trackio"]["secret_ref"] == "env:SOME_KEY"
    assert CANARY not in json.dumps(facts.config)


def test_the_end_has_the_status_and_the_headline_of_the_report(tmp_path: Path):
    sink = Recording()
    tell(tmp_path, sink, three_steps)
    last = sink.taken[-1]
    assert isinstance(last, Ending)
    assert (last.status, last.step, dict(last.headline)) == ("succeeded", 3, {"student_after": 0.5})


def test_a_run_that_raises_ends_for_its_sinks_as_it_stands(tmp_path: Path):
    sink = Recording()

    def work(journal: Journal) -> None:
        journal.status(Status.FAILED)
        raise RuntimeError("the run is over")

    with pytest.raises(RuntimeError, match="the run is over"):
        tell(tmp_path, sink, work)
    assert sink.taken[-1].status == "failed"


def test_going_back_to_a_checkpoint_undoes_the_steps_after_it(tmp_path: Path):
    sink = Recording()

    def work(journal: Journal) -> None:
        journal.event("run.started", "opd on jsonl", steps=9)
        for number in (1, 2, 3):
            journal.metrics(number, {"loss": 1.0})
        journal.event("run.resumed", "going on from step 1", step=1, kept=0)
        journal.metrics(2, {"loss": 2.0})

    folder = tell(tmp_path, sink, work)
    assert [type(record).__name__ for record in sink.taken] == ["Step"] * 3 + ["Rewind", "Step", "Ending"]
    assert sink.taken[3].step == 1
    again = Recording()

    def begin_anew(journal: Journal) -> None:
        journal.event("run.started", "no checkpoint was left: from the beginning", steps=9)

    tell(folder.parent, again, begin_anew, resume=True)
    assert again.opened[0].resumed
    assert again.taken[0] == Rewind(step=0, time=again.taken[0].time)


# ------------------------------------------------------------------------------------------ that they cannot hurt a run


def test_what_a_sink_refuses_is_one_event_for_each_cause_and_the_run_is_whole(tmp_path: Path):
    def work(journal: Journal) -> None:
        for number in range(1, 200):
            journal.metrics(number, {"loss": 1.0})
        three_steps(journal)

    folder = tell(tmp_path, Refusing(), work)
    (failed,), (dropped,) = events(folder, "sink.failed"), events(folder, "sink.dropped")
    assert failed["level"] == dropped["level"] == "warn"
    assert failed["message"].startswith("sink some: no connection from port 4")
    assert dropped["data"] == {"sink": "some", "records": 202}
    assert len(list(read_jsonl(folder / "metrics.jsonl"))) == 202
    assert [event["seq"] for event in read_jsonl(folder / "events.jsonl")] == [1, 2, 3]


def test_a_sink_that_cannot_be_opened_is_told_and_the_run_is_whole(tmp_path: Path):
    folder = tell(tmp_path, Closed(), three_steps)
    assert [event["data"]["cause"] for event in events(folder, "sink.failed")] == ["the key is not known here"]
    assert [event["data"]["records"] for event in events(folder, "sink.dropped")] == [3]


def test_a_sink_that_hangs_for_ever_is_given_up_when_its_time_is_over(tmp_path: Path):
    sink = Hanging()
    started = time.monotonic()
    folder = tell(tmp_path, sink, three_steps, close_s=0.3)
    assert time.monotonic() - started < 10
    assert sink.reached.is_set()
    (failed,), (dropped,) = events(folder, "sink.failed"), events(folder, "sink.dropped")
    assert "not done when the time for it was over" in failed["message"]
    assert dropped["data"]["records"] >= 2
    assert len(list(read_jsonl(folder / "metrics.jsonl"))) == 3


def test_a_process_ends_although_a_sink_of_it_hangs_for_ever(tmp_path: Path):
    """Nobody releases this one: its thread dies with the process."""
    script = (
        "import sys; from pathlib import Path\n"
        "from potstill.sinks.feed import Feed\n"
        "from tests.sinks import make_config, tell, three_steps, Hanging, facts_of, step\n"
        "import time\n"
        "feed = Feed('some', Hanging(), facts_of(Path(sys.argv[1])), capacity=10)\n"
        "feed.put(step(1, loss=1.0)); feed.join(time.monotonic() + 0.1); print(feed.lost)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "1\n"


def test_a_flood_does_not_wait_for_a_slow_sink_which_loses_the_oldest_and_says_how_many(tmp_path: Path):
    sink, count, capacity = Slow(seconds=0.05), 3000, 10
    writing = [math.inf]

    def work(journal: Journal) -> None:
        started = time.monotonic()
        for number in range(1, count + 1):
            journal.metrics(number, {"loss": 1.0})
        writing[0] = time.monotonic() - started

    folder = tell(tmp_path, sink, work, queue=capacity, close_s=20.0)
    assert writing[0] < 0.05 * count / 5  # at the sink's pace it would take 150 s
    assert sink.steps[-capacity:] == list(range(count - capacity + 1, count + 1))
    (dropped,) = events(folder, "sink.dropped")
    assert dropped["data"]["records"] == count - len(sink.steps)
    assert len(list(read_jsonl(folder / "metrics.jsonl"))) == count


def test_a_sink_that_is_lost_is_opened_again_and_goes_on(tmp_path: Path):
    sink = Losing()
    feed = Feed("some", sink, facts_of(tmp_path), capacity=10)
    for number in (1, 2, 3):
        feed.put(step(number, loss=1.0))
    wait_until(lambda: sink.steps == [2, 3])
    feed.end(ending())
    feed.join(time.monotonic() + 10)
    assert [facts.resumed for facts in sink.opened] == [False, True]
    assert list(feed.troubles()) == ["the other side has gone away"]
    assert (feed.lost, sink.ended.is_set()) == (1, True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_in_a_sink_ends_that_sink_alone(tmp_path: Path):
    folder = tell(tmp_path, Broken(), three_steps)
    assert [event["data"]["cause"] for event in events(folder, "sink.failed")] == ["KeyError: 'no such table'"]
    assert len(list(read_jsonl(folder / "metrics.jsonl"))) == 3


def test_one_sink_that_fails_takes_nothing_from_another(tmp_path: Path):
    good, config = Recording(), make_config(tmp_path)
    journal = Journal(tmp_path / "told")
    hanging = Hanging()
    sinks = [
        Ready(name="hangs", sink=hanging, abandon=hanging.released.set),
        Ready(name="refuses", sink=Refusing(), abandon=lambda: None),
        Ready(name="works", sink=good, abandon=lambda: None),
    ]
    with told(sinks, config, journal, resumed=False):
        three_steps(journal)
    assert good.steps == [1, 2, 3]
    assert {event["data"]["sink"] for event in events(journal.folder, "sink.failed")} == {"hangs", "refuses"}


def test_a_sink_hears_nothing_of_what_sinks_say(tmp_path: Path):
    sink = Refusing()
    tell(tmp_path, sink, three_steps)
    assert [record for record in sink.taken if isinstance(record, Note)] == []


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"wandb": {"project": "p"}}, 'mode "online" goes with secret_ref'),
        ({"wandb": {"project": "p", "secret_ref": "the-key-itself"}}, "should match pattern"),
        ({"mlflow": {"tracking_uri": "databricks"}}, "should match pattern"),
        (
            {"mlflow": {"tracking_uri": "sqlite:///a.db", "secret_ref": "env:KEY"}},
            "goes with a tracking_uri of a server",
        ),
        ({"trackio": {"project": "p", "url": "http://127.0.0.1:7860"}}, "url goes with secret_ref"),
        ({"tensorboard": {"folder": "../elsewhere"}}, "should match pattern"),
        ({"tensorboard": {"folder": "/elsewhere"}}, "should match pattern"),
        ({"queue": 0}, "greater than or equal to 1"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(table: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        SinksConfig.model_validate(table)


def test_the_tables_of_the_page_are_ones():
    page = (Path(__file__).parents[2] / "docs" / "sinks.md").read_text()
    (table,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    sinks = SinksConfig.model_validate(tomllib.loads(table)["sinks"])
    assert None not in (sinks.tensorboard, sinks.wandb, sinks.mlflow, sinks.trackio)


def test_over_http_a_config_may_name_tensorboard_alone():
    table = {"tensorboard": {}, "trackio": {"project": "p"}}
    marks = {found.key: found.stands for found in references(SinksConfig.model_validate(table))}
    assert marks == {"tensorboard.folder": Stands.BELOW, "trackio": Stands.OUTSIDE}


def test_nobody_is_told_anything_unless_a_table_names_them(tmp_path: Path):
    assert ready(make_config(tmp_path).sinks) == []
    assert [one.name for one in ready(make_config(tmp_path, tensorboard={}).sinks)] == ["tensorboard"]


def test_a_missing_package_names_the_extra_that_brings_it():
    with pytest.raises(ConfigError, match=r"sinks\.trackio: the package no-such-package .* 'potstill\[trackio\]'"):
        require("trackio", "trackio", ("no-such-package",))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"secret_ref": "env:NOT_SET_ANYWHERE"}, r"sinks\.wandb\.secret_ref: the environment has no variable"),
        ({"secret_ref": "env:PATH", "url": "http://169.254.169.254"}, "never called"),
        ({"secret_ref": "env:PATH", "url": "http://wandb.example@127.0.0.1"}, "no user name"),
    ],
)
def test_a_wrong_setting_is_found_before_a_run_begins(table: dict[str, Any], said: str):
    sinks = SinksConfig.model_validate({"wandb": {"project": "p", **table}})
    with pytest.raises(ConfigError, match=said):
        ready(sinks)


def test_no_client_is_imported_before_it_is_used():
    clients = "{'tensorboard', 'wandb', 'mlflow', 'trackio', 'torch', 'tensorflow'}"
    script = f"import sys, orchestrator.foreground; print({clients} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_config_becomes_parameters_of_keys_that_mlflow_takes():
    config = {"loop": {"steps": 3, "seed": None}, "rollout": {"sampling": {"top_p": 1.0}}, "betas": [0.9, 0.95]}
    assert dict(leaves(config)) == {"loop.steps": "3", "rollout.sampling.top_p": "1.0", "betas": "[0.9, 0.95]"}
    assert key_of("event.alarm(one)") == "event.alarm_one_"


def test_an_id_elsewhere_is_of_one_place(tmp_path: Path):
    keep_id(tmp_path / "mlflow.json", "http://127.0.0.1:5000", "8c1f")
    assert kept_id(tmp_path / "mlflow.json", "http://127.0.0.1:5000") == "8c1f"
    assert kept_id(tmp_path / "mlflow.json", "http://127.0.0.1:6000") is None
    (tmp_path / "mlflow.json").write_text("not JSON")
    assert kept_id(tmp_path / "mlflow.json", "http://127.0.0.1:5000") is None
