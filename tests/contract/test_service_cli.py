"""The commands that speak with a service: what they print, and how they exit."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from orchestrator.service.serve import claim
from potstill.service_cli import register
from tests.launchers import ProcessLauncher
from tests.service_configs import submitted
from tests.services import RUN, Service, serving, until


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, lambda url: ProcessLauncher(folder / "jobs", RUN, url)) as running:
        yield running


@pytest.fixture(scope="module")
def cli() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


def test_submit_and_wait_exits_as_the_run_ends(service: Service, cli: typer.Typer, tmp_path: Path):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(submitted(name="cli-0") | {"runs": "mine"}))
    env = {"POTSTILL_URL": service.url, "POTSTILL_API_KEY": service.key}
    runner = CliRunner(env=env)
    for seed, code in ((0, 0), (1, 1)):
        result = runner.invoke(cli, ["submit", str(config), f"name=cli-{seed}", f"seed={seed}", "--wait", "--json"])
        assert (result.exit_code, json.loads(result.stdout)["id"]) == (code, f"cli-{seed}")
    assert json.loads(runner.invoke(cli, ["status", "cli-1", "--json"]).stdout)["status"] == "failed"
    assert "NaN" in runner.invoke(cli, ["status", "cli-1"]).stdout
    assert "cli-1" in runner.invoke(cli, ["list"]).stdout
    lines = runner.invoke(cli, ["events", "cli-0", "-f", "--json"]).stdout.splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, len(lines) + 1))


def test_cancel_from_the_command_line_makes_the_waiter_exit_5(service: Service, cli: typer.Typer, tmp_path: Path):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(submitted(name="cli-2", seed=2)))
    env = {"POTSTILL_URL": service.url, "POTSTILL_API_KEY": service.key}
    codes: list[int] = []
    waiter = CliRunner(env=env)
    thread = threading.Thread(
        target=lambda: codes.append(waiter.invoke(cli, ["submit", str(config), "--wait"]).exit_code)
    )
    thread.start()
    until(lambda: service.store.has_run("cli-2") and service.store.get_run("cli-2").state == "running")
    with service.client() as client:
        client.cancel_run("cli-2")
    thread.join(30.0)
    assert codes == [5]


@pytest.mark.parametrize(
    ("env", "arguments", "code", "says"),
    [
        ({"POTSTILL_API_KEY": ""}, ["list"], 2, "POTSTILL_API_KEY is not set"),
        ({"POTSTILL_API_KEY": "x"}, ["list"], 4, "this key is not known"),
        ({}, ["status", "nobody"], 4, "there is no such run"),
        ({}, ["submit", "nowhere.toml"], 2, "nowhere.toml"),
        ({"POTSTILL_URL": "http://127.0.0.1:1"}, ["list"], 4, "does not answer"),
    ],
)
def test_an_error_is_one_line_on_stderr_with_its_exit_code(
    service: Service, cli: typer.Typer, env: dict[str, str], arguments: list[str], code: int, says: str
):
    runner = CliRunner(env={"POTSTILL_URL": service.url, "POTSTILL_API_KEY": service.key} | env)
    result = runner.invoke(cli, arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_host_beyond_loopback_needs_a_key_first(cli: typer.Typer, tmp_path: Path):
    result = CliRunner().invoke(cli, ["serve", "--host", "192.0.2.1", "--runs", str(tmp_path / "runs")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no API key yet" in result.stderr


def test_a_folder_of_runs_has_one_service(cli: typer.Typer, tmp_path: Path):
    with claim(tmp_path / "runs"):
        result = CliRunner().invoke(cli, ["serve", "--runs", str(tmp_path / "runs")])
        assert (result.exit_code, "another `potstill serve`" in result.stderr) == (2, True)
    claim(tmp_path / "runs").close()


def test_the_first_key_is_shown_once_and_kept_private_where_asked(cli: typer.Typer, tmp_path: Path):
    runs, key_file = tmp_path / "runs", tmp_path / "key"
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that it stops after the key and before the cluster
        port = str(taken.getsockname()[1])
        arguments = ["serve", "--runs", str(runs), "--key-file", str(key_file), "--port", port]
        first, second = CliRunner().invoke(cli, arguments), CliRunner().invoke(cli, arguments)
    assert (first.exit_code, second.exit_code) == (2, 2)
    key = key_file.read_text().strip()
    assert key in first.stdout
    assert key not in second.stdout
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert all(key.encode() not in path.read_bytes() for path in runs.iterdir())
