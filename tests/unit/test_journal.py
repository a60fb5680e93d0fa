"""What a run leaves on disk is whole, numbered without gaps, and true at any moment."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import ConfigError, NonFinite
from potstill.journal import Journal, Status, read_jsonl, steps_in, write_atomically, write_json


def test_records_are_numbered_without_gaps_in_each_stream(tmp_path: Path):
    journal = Journal(tmp_path)
    for step in range(1, 4):
        journal.event("step.finished", f"step {step}", step=step)
        journal.metrics(step, {"loss": 1 / step})
    journal.event("run.finished", "done")
    journal.close()
    events, metrics = list(read_jsonl(tmp_path / "events.jsonl")), list(read_jsonl(tmp_path / "metrics.jsonl"))
    assert [event["seq"] for event in events] == [1, 2, 3, 4]
    assert [(line["seq"], line["step"], line["loss"]) for line in metrics] == [(1, 1, 1.0), (2, 2, 0.5), (3, 3, 1 / 3)]
    assert events[0].items() >= {
        "type": "step.finished", "level": "info", "message": "step 1", "data": {"step": 1},
    }.items()  # fmt: skip


def test_a_torn_last_line_is_left_out(tmp_path: Path):
    log = tmp_path / "events.jsonl"
    log.write_text('{"seq":1}\n{"seq":2}\n{"seq":3,"mess')
    assert [record["seq"] for record in read_jsonl(log)] == [1, 2]


def test_a_log_that_is_not_there_is_empty(tmp_path: Path):
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_a_step_that_was_done_again_counts_as_it_was_last(tmp_path: Path):
    journal = Journal(tmp_path)
    for attempt, steps in enumerate([(1, 2, 3, 4), (3,), (3, 4, 5), (5,)]):
        for step in steps:
            journal.metrics(step, {"attempt": attempt})
    assert [(record["step"], record["attempt"]) for record in steps_in(tmp_path)] == [
        (1, 0), (2, 0), (3, 2), (4, 2), (5, 3),
    ]  # fmt: skip


def test_a_run_that_went_back_has_not_done_what_it_undid(tmp_path: Path):
    journal = Journal(tmp_path)
    for step in (1, 2, 3, 4, 5, 3):
        journal.metrics(step, {})
    assert [record["step"] for record in steps_in(tmp_path)] == [1, 2, 3]
    assert steps_in(tmp_path / "none") == []


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path):
    first = Journal(tmp_path)
    first.event("run.started", "one")
    first.close()
    with pytest.raises(ConfigError, match="already holds a run"):
        Journal(tmp_path)
    assert len(list(read_jsonl(tmp_path / "events.jsonl"))) == 1


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run to resume: start it without --resume"):
        Journal(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_resumed_run_goes_on_numbering_where_it_was_cut_off(tmp_path: Path):
    first = Journal(tmp_path)
    for step in (1, 2):
        first.event("step.finished", f"step {step}")
        first.metrics(step, {"loss": 1.0})
        first.trained(step, [f"train-{step}"])
        first.sample({"step": step})
    first.status(Status.CANCELLED)
    first.close()
    logs = [tmp_path / f"{name}.jsonl" for name in ("events", "metrics", "ledger", "samples")]
    for log in logs:
        with log.open("a") as file:
            file.write('{"seq":3,"cut off in the mid')
    second = Journal(tmp_path, resume=True)
    assert second.num_steps == 2
    second.event("run.resumed", "from step 2")
    second.metrics(3, {"loss": 1.0})
    second.trained(3, ["train-3"])
    second.sample({"step": 3})
    second.status(Status.STARTING)
    second.close()
    assert [record["seq"] for log in logs[:2] for record in read_jsonl(log)] == [1, 2, 3] * 2
    assert [record["step"] for log in logs[1:] for record in read_jsonl(log)] == [1, 2, 3] * 3
    assert all(log.read_text().endswith("}\n") for log in logs)
    assert second.num_steps == 3


def test_a_run_that_was_killed_before_its_first_step_can_be_resumed(tmp_path: Path):
    (tmp_path / "events.jsonl").write_text('{"seq":1,"ty')
    journal = Journal(tmp_path, resume=True)
    journal.event("run.started", "one")
    assert [record["seq"] for record in read_jsonl(tmp_path / "events.jsonl")] == [1]


def test_what_is_logged_can_be_made_to_survive_a_power_cut(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.metrics(1, {})
    journal.sync()
    assert [record["step"] for record in steps_in(tmp_path)] == [1]


@pytest.mark.parametrize("last", [Status.SUCCEEDED, Status.FAILED, Status.CANCELLED])
def test_a_final_status_is_never_left(tmp_path: Path, last: Status):
    journal = Journal(tmp_path)
    journal.status(Status.RUNNING)
    journal.status(last)
    for later in Status:
        with pytest.raises(ValueError, match="already"):
            journal.status(later)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == last.value


def test_a_failure_names_its_error_and_whose_it_is(tmp_path: Path):
    Journal(tmp_path).status(Status.FAILED, error=NonFinite("step 3: the loss is NaN"))
    found = json.loads((tmp_path / "status.json").read_text())
    assert found["error"] == {"type": "NonFinite", "category": "system", "message": "step 3: the loss is NaN"}
    assert found["pid"] == os.getpid()


def test_what_is_missing_becomes_null_wherever_it_is(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.metrics(1, {"loss": math.nan, "norm": math.inf, "lr": 0.0})
    journal.event("eval", "none", nested={"list": [1.0, -math.inf]})
    journal.sample({"reward": math.nan})
    write_json(tmp_path / "report.json", {"teacher": math.nan})
    assert next(read_jsonl(tmp_path / "metrics.jsonl")).items() >= {"loss": None, "norm": None, "lr": 0.0}.items()
    assert next(read_jsonl(tmp_path / "events.jsonl"))["data"] == {"nested": {"list": [1.0, None]}}
    assert next(read_jsonl(tmp_path / "samples.jsonl")) == {"reward": None}
    assert json.loads((tmp_path / "report.json").read_text()) == {"teacher": None}


def test_listeners_are_told_after_the_record_is_on_disk(tmp_path: Path):
    journal = Journal(tmp_path)
    seen: list[tuple[str, bool]] = []

    def listener(stream: str, record: Any) -> None:
        if stream == "status":
            on_disk = json.loads((tmp_path / "status.json").read_text()) == dict(record)
        else:
            name = {"event": "events.jsonl", "metrics": "metrics.jsonl"}[stream]
            on_disk = list(read_jsonl(tmp_path / name))[-1] == dict(record)
        seen.append((stream, on_disk))

    journal.listen(listener)
    journal.event("a", "b")
    journal.metrics(1, {"loss": 1.0})
    journal.status(Status.RUNNING)
    assert seen == [("event", True), ("metrics", True), ("status", True)]


def test_a_reader_never_sees_a_part_of_a_file(tmp_path: Path):
    """A child rewrites one file as fast as it can and is killed in the middle; every look finds a whole version."""
    target = tmp_path / "status.json"
    script = (
        "import sys; from pathlib import Path; from potstill.journal import write_atomically\n"
        "for n in range(10**9): write_atomically(Path(sys.argv[1]), bytes([65 + n % 26]) * 1_000_000)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(target)])
    looks = 0
    deadline = time.monotonic() + 20
    while looks < 50 and time.monotonic() < deadline:
        if target.exists():
            content = target.read_bytes()
            assert len(content) == 1_000_000
            assert len(set(content)) == 1
            looks += 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert looks == 50
    assert len(set(target.read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["status.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "status.json"
    write_json(target, {"step": 1})
    with pytest.raises(TypeError):
        write_json(target, {"step": object()})
    write_atomically(tmp_path / "other", b"x")
    assert json.loads(target.read_text()) == {"step": 1}


def test_a_killed_writers_lines_are_all_there(tmp_path: Path):
    script = (
        "import os, signal, sys; from pathlib import Path; from potstill.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for step in range(100): journal.event('step', 'one')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert [record["seq"] for record in read_jsonl(tmp_path / "events.jsonl")] == list(range(1, 101))
