"""The commands about runs at a service: what they print, and how they exit."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pyarrow import parquet

from tests.commands import Command, commanding, commands, done, finished, read, refused
from tests.launchers import ProcessLauncher
from tests.run_folders import make_samples
from tests.service_configs import submitted
from tests.services import RUN, Service, serving, until
from tests.terminals import on_a_terminal


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, lambda url: ProcessLauncher(folder / "jobs", RUN, url)) as running:
        yield running


@pytest.fixture
def command(service: Service, tmp_path: Path) -> Command:
    return commanding(service, tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config of a run that succeeds, as `potstill run` would take it."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(submitted() | {"runs": "mine"}))
    return path


# --------------------------------------------------------------------------------------------------------- submitting


def test_submit_and_wait_exits_as_the_run_ends(command: Command, config: Path):
    for seed, code in ((0, 0), (1, 1)):
        result = command("submit", config, f"name=cli-{seed}", f"seed={seed}", "--wait", "--json")
        assert (result.exit_code, json.loads(result.stdout)["id"]) == (code, f"cli-{seed}")
        assert f"cli-{seed} is queued\n" in result.stderr
    assert read(command("status", "cli-1", "--json"))["status"] == "failed"
    assert "NaN" in done(command("status", "cli-1"))
    assert "cli-1" in done(command("list"))
    lines = done(command("events", "cli-0", "-f", "--json")).splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, len(lines) + 1))


def test_cancel_from_the_command_line_makes_the_waiter_exit_5(service: Service, command: Command, config: Path):
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(command("submit", config, "name=stopped", "seed=2", "--wait").exit_code)
    )
    thread.start()
    until(lambda: service.store.runs.exists("stopped") and service.store.runs.get("stopped").state == "running")
    assert "stopped is cancel" in done(command("cancel", "stopped", "--reason", "enough"))
    thread.join(30.0)
    assert codes == [5]
    assert "enough" in done(command("events", "stopped"))


def test_what_is_said_of_a_run_is_shown_and_listed(command: Command, config: Path):
    said = ["--meta", "team=red", "--meta", "note=a=b", "--notes", "the second try", "--priority", "7"]
    made = read(command("submit", config, "name=said", *said, "--json"))
    assert (made["metadata"], made["notes"], made["priority"]) == ({"team": "red", "note": "a=b"}, "the second try", 7)
    shown = done(command("status", "said"))
    assert all(word in shown for word in ("team = red", "the second try", "sft of none"))
    assert [run["id"] for run in read(command("list", "--meta", "team=red", "--json"))["data"]] == ["said"]
    assert read(command("list", "--status", "paused", "--json"))["data"] == []
    for since, found in (("2020-01-01T00:00:00Z", ["said"]), ("2120-01-01T00:00:00Z", [])):
        listed = read(command("list", "--since", since, "--meta", "team=red", "--json"))["data"]
        assert [run["id"] for run in listed] == found
    refused(command("submit", config, "--meta", "team"), 2, "--meta team", "name=value")


def test_pages_of_runs_say_how_to_go_on(service: Service, command: Command):
    names = [finished(service, f"page-{number}") for number in range(2)]
    first = command("list", "--limit", "1")
    assert names[1] in done(first)
    assert first.stderr == f"there are more: --after {names[1]}\n"
    assert names[0] in done(command("list", "--limit", "1", "--after", names[1]))


def test_a_request_that_is_sent_again_under_its_name_makes_one_run(command: Command, config: Path):
    first = read(command("submit", config, "name=once", "--idempotency-key", "k-1", "--json"))
    again = read(command("submit", config, "name=once", "--idempotency-key", "k-1", "--json"))
    assert again["created_at"] == first["created_at"]
    refused(command("submit", config, "name=twice", "--idempotency-key", "k-1"), 4, "idempotency_key_reused")


def test_a_data_file_of_this_machine_is_uploaded_once_and_named_by_its_id(
    service: Service, command: Command, config: Path, tmp_path: Path
):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "1 + 1 = ?", "solution": "2"}\n')
    first = command("submit", config, "name=own-data", f"data.path={data}", "--wait")
    done(first)
    (found,) = re.findall(r"is uploaded, as (file-\w+)", first.stderr)
    assert service.store.runs.get("own-data").submitted["data"]["path"] == found
    second = command("submit", config, "name=own-data-2", f"data.path={data}")
    done(second)
    assert f"is there already, as {found}" in second.stderr
    data.write_text('{"prompt": 3}\n')
    refused(command("submit", config, "name=own-data-3", f"data.path={data}"), 4, "line 1")


@pytest.mark.parametrize("name", ["/models/big", "./student", "~/student", "here"])
def test_a_model_that_is_a_folder_here_is_refused_with_the_fix(
    command: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (tmp_path / "here").mkdir()
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    line = refused(command("submit", config, "name=path", f"student.model={name}"), 2, "student.model", "--models root")
    assert name in line
    assert read(command("submit", config, "--dry-run", "--json"))["config"]["student"]["model"] == "none"


def test_a_dry_run_shows_config_and_plan_and_makes_no_run(service: Service, command: Command, config: Path):
    for_people = done(command("submit", config, "name=only-asked", "optim.lr=2e-5", "--dry-run"))
    for_programs = read(command("submit", config, "name=only-asked", "optim.lr=2e-5", "--dry-run", "--json"))
    assert "lr: 2.0e-05" in for_people
    assert "plan:" in for_people
    assert (for_programs["object"], for_programs["config"]["optim"]["lr"]) == ("run.plan", 2e-5)
    assert not service.store.runs.exists("only-asked")


def test_a_config_is_checked_before_anything_is_sent(command: Command, config: Path):
    away = {"POTSTILL_URL": "http://127.0.0.1:1"}
    refused(command("submit", config, "optim.warmup_step=3", **away), 2, "did you mean 'warmup_steps'?")
    refused(command("submit", "nowhere.toml", **away), 2, "nowhere.toml")
    refused(command("submit", config, "oops", **away), 2, "key.path=value")


def test_a_teacher_that_only_the_service_knows_is_left_to_it(command: Command, config: Path):
    named = ['teacher={"kind": "registered", "name": "nobody"}', "method=opd"]
    refused(command("submit", config, "name=borrowed", *named), 4, "nobody", "invalid_config")


# ----------------------------------------------------------------------------------------------------------- steering


def test_a_run_is_paused_resumed_cancelled_and_tried_again(service: Service, command: Command, config: Path):
    def reaches(status: str) -> bool:
        return bool(until(lambda: read(command("status", "steered", "--json"))["status"] == status))

    done(command("submit", config, "name=steered", "seed=2"))
    assert reaches("running")
    assert "steered is paus" in done(command("pause", "steered"))
    assert reaches("paused")
    assert "steered is queued" in done(command("resume", "steered"))
    assert reaches("running")
    assert read(command("cancel", "steered", "--now", "--json"))["status"] == "cancelling"
    assert reaches("cancelled")
    assert read(command("retry", "steered", "--json"))["attempt"] == 3
    done(command("cancel", "steered", "--now"))
    assert reaches("cancelled")
    refused(command("resume", "steered"), 4, "only a paused run is resumed", "illegal_transition")


def test_a_fork_is_a_new_run_with_other_settings(service: Service, command: Command):
    parent = finished(service, "parent")
    made = read(command("fork", parent, "--name", "child", "optim.lr=1e-5", "loop.steps=2", "--meta", "a=b", "--json"))
    assert (made["forked_from"], made["metadata"]) == ({"run": "parent", "checkpoint": None}, {"a": "b"})
    with service.client() as client:
        config = client.get_config("child")
        assert "lr = 1e-05" in client.config_text("child", format="toml")
    assert (config["optim"]["lr"], config["loop"]["steps"]) == (1e-5, 2)
    refused(command("fork", parent, "--name", "x", "--from", "step-9"), 4, "no such checkpoint")


def test_priority_metadata_and_notes_are_changed_while_a_run_goes_on(command: Command, config: Path):
    done(command("submit", config, "name=edited", "seed=2", "--meta", "a=b"))
    run = read(command("edit", "edited", "--notes", "new", "--priority", "-3", "--json"))
    assert (run["notes"], run["priority"], run["metadata"]) == ("new", -3, {"a": "b"})
    assert read(command("edit", "edited", "--meta", "c=d", "--json"))["metadata"] == {"c": "d"}
    refused(command("edit", "edited"), 2, "nothing to change")
    done(command("cancel", "edited", "--now"))


def test_a_run_is_forgotten_and_its_folder_removed_only_when_asked(service: Service, command: Command):
    for name, options, stays in (("kept", (), True), ("gone", ("--artifacts",), False)):
        finished(service, name)
        result = command("delete", name, *options)
        assert (done(result), (service.folder / "runs" / name).exists()) == ("", stays)
        assert f"{name} is forgotten" in result.stderr
        refused(command("status", name), 4, "there is no such run")


# ------------------------------------------------------------------------------------------------------------ reading


def test_events_are_lines_for_people_and_json_lines_for_programs(service: Service, command: Command):
    name = finished(service, "told", seed=1)
    lines = done(command("events", name)).splitlines()
    assert re.fullmatch(r"\S+Z info    run\.status: the run is stored and waits for its turn", lines[0])
    errors = done(command("events", name, "--level", "error", "--json")).splitlines()
    assert {json.loads(line)["level"] for line in errors} == {"error"}
    statuses = done(command("events", name, "--type", "run.status", "--follow", "--json")).splitlines()
    assert [json.loads(line)["data"]["status"] for line in statuses][-1] == "failed"
    last = json.loads(statuses[-1])["seq"]
    assert done(command("events", name, "--after", str(last))) == ""


def test_a_name_or_message_cannot_speak_to_the_terminal(service: Service, command: Command, config: Path):
    notes = "\x1b[2Jgone\r\nsecond line\u202e"
    done(command("submit", config, "name=loud", "--notes", notes, "--meta", "a=\x1b]0;title\x07"))
    shown = done(command("status", "loud"))
    assert "\\x1b[2Jgone\\r\nsecond line\\u202e\n" in shown
    assert "a = \\x1b]0;title\\x07\n" in shown


def test_logs_are_read_and_followed_to_the_end(service: Service, command: Command):
    name = finished(service, "dies", seed=3)
    for arguments in (("logs", name), ("logs", name, "-f"), ("logs", name, "--tail", "3")):
        assert "the last words of this process" in done(command(*arguments))
    refused(command("logs", name, "--role", "learner"), 4, "no log of role learner", "log_not_found")


def test_metrics_are_a_table_or_a_file(service: Service, command: Command, tmp_path: Path):
    name = finished(service, "measured")
    table = [line.split() for line in done(command("metrics", name)).splitlines()]
    assert table == [["STEP", "loss"], ["1", "1.0000"], ["2", "0.5000"], ["3", "0.3333"]]
    ends = done(command("metrics", name, "--rows", "2")).splitlines()
    assert [line.split()[0] for line in ends] == ["STEP", "1", "3"]
    missing = done(command("metrics", name, "--keys", "loss,nothing", "--after-step", "2")).splitlines()
    assert [line.split() for line in missing] == [["STEP", "loss", "nothing"], ["3", "0.3333", "–"]]
    rows = list(csv.DictReader(io.StringIO(done(command("metrics", name, "--format", "csv")))))
    assert [float(row["loss"]) for row in rows] == [1.0, 0.5, 1 / 3]
    assert read(command("metrics", name, "--json"))["columns"]["loss"] == [1.0, 0.5, 1 / 3]
    done(command("metrics", name, "--format", "parquet", "-o", tmp_path / "m.parquet"))
    assert parquet.read_table(tmp_path / "m.parquet").column("loss").to_pylist() == [1.0, 0.5, 1 / 3]
    refused(command("metrics", name, "--format", "parquet"), 2, "name a file with -o")


def test_samples_are_json_lines(service: Service, command: Command):
    name = finished(service, "sampled")
    make_samples(service.folder / "runs" / name, {1: 2, 2: 3})
    shown = [json.loads(line) for line in done(command("samples", name, "--limit", "2")).splitlines()]
    assert [sample["step"] for sample in shown] == [2, 2]
    assert len(done(command("samples", name, "--step", "1")).splitlines()) == 2


@pytest.mark.parametrize(
    ("env", "arguments", "code", "words"),
    [
        ({"POTSTILL_API_KEY": ""}, ["list"], 2, ["POTSTILL_API_KEY is not set", "potstill login"]),
        ({"POTSTILL_API_KEY": "x"}, ["list"], 4, ["this key is not known", "invalid_key, request "]),
        ({}, ["list", "--key-env", "NONE"], 2, ["NONE is not set"]),
        ({}, ["status", "nobody"], 4, ["there is no such run", "run_not_found, request "]),
        ({}, ["status", ".."], 2, ["names nothing"]),
        ({"POTSTILL_URL": "http://127.0.0.1:1"}, ["whoami"], 4, ["http://127.0.0.1:1 does not answer"]),
        ({"POTSTILL_URL": "127.0.0.1"}, ["list"], 2, ["no base URL"]),
    ],
)
def test_an_error_is_one_line_on_stderr_with_its_exit_code(
    command: Command, env: dict[str, str], arguments: list[str], code: int, words: list[str]
):
    refused(command(*arguments, **env), code, *words)


def test_no_command_takes_a_key_as_an_argument():
    group = typer.main.get_command(commands())
    every = [group, *group.commands.values()]  # type: ignore[attr-defined]
    every += [inner for command in every[1:] for inner in getattr(command, "commands", {}).values()]
    options = {option for command in every for parameter in command.params for option in parameter.opts}
    assert {"--key-env", "--key-file"} <= options
    assert not options & {"--key", "--api-key", "--token", "--secret", "--password"}


def test_on_a_terminal_a_waiter_sees_the_runs_panel(service: Service, config: Path):
    env = {"POTSTILL_URL": service.url, "POTSTILL_API_KEY": service.key}
    for seed, code in ((0, 0), (1, 1)):
        arguments = ["submit", str(config), f"name=panel-{seed}", f"seed={seed}", "--wait"]
        found, painted = on_a_terminal([sys.executable, "-m", "potstill", *arguments], env)
        assert found == code
        assert f"panel-{seed}" in painted
        assert "3/3" in painted
        assert f"panel-{seed} is {'failed' if code else 'succeeded'}" in painted
