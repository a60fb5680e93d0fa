"""The commands that speak with a service: serve, submit, status, list, events, cancel. `register` adds them to an app.

URL and key come from --url and the variable that --key-env names, else from POTSTILL_URL and POTSTILL_API_KEY: a key
is never an argument, where other users of the machine could read it. Data goes to stdout, errors to stderr, one line.
Imports nothing heavy before a command runs.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from potstill.errors import ConfigError, PotstillError

if TYPE_CHECKING:
    from potstill.client import Client

P = ParamSpec("P")
R = TypeVar("R")

EXIT_OF_STATUS = {"succeeded": 0, "failed": 1, "cancelled": 5}

Url = Annotated[str, typer.Option(envvar="POTSTILL_URL", help="Base URL of the service.")]
KeyEnv = Annotated[str, typer.Option(help="Environment variable that holds the API key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
HERE = "http://127.0.0.1:8000"


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    for command in (serve, submit, status, list_, events, cancel):
        app.command(name=command.__name__.rstrip("_"))(command)


def _one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Show a PotstillError as one line on stderr and exit with its code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except PotstillError as error:
            typer.echo(f"potstill: {'; '.join(str(error).splitlines())}", err=True)
            raise typer.Exit(error.exit_code) from None

    return wrapped


@_one_line_errors
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free port.", min=0, max=65535)] = 8000,
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL; by default a SQLite file in --runs.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Also write the first API key here, mode 0600.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another Host name to answer to; repeatable.")] = None,
    report_url: Annotated[str | None, typer.Option(help="How runs reach this service from the cluster.")] = None,
) -> None:
    """Serve the API. Uses the Ray cluster at RAY_ADDRESS, or starts a Ray head of its own on loopback."""
    from orchestrator.service.serve import ServiceOptions, serve

    folder = runs.resolve()
    options = ServiceOptions(
        host=host,
        port=port,
        runs=folder,
        database=database or f"sqlite:///{folder / 'potstill.db'}",
        key_file=key_file,
        allowed_hosts=tuple(allow_host or ()),
        report_url=report_url,
    )
    serve(options, typer.echo)


@_one_line_errors
def submit(
    config: Annotated[Path, typer.Argument(help="A .toml, .yaml or .json file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted settings: optim.lr=1e-4")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Exit 0 succeeded, 1 failed, 5 cancelled.")] = False,
    as_json: AsJson = False,
    url: Url = HERE,
    key_env: KeyEnv = "POTSTILL_API_KEY",
) -> None:
    """Submit a run. The config is checked here first; paths in it are the service's."""
    from potstill.config_file import load

    checked = load(config, overrides or ()).model_dump(mode="json", exclude={"runs"})  # the service has its own folder
    with _client(url, key_env) as client:
        run = client.create_run(checked)
        if wait:
            if not as_json:
                typer.echo(f"{run['id']} is {run['status']}", err=True)
            run = client.wait(run["id"])
    _show(run, as_json)
    if wait:
        raise typer.Exit(EXIT_OF_STATUS[run["status"]])


@_one_line_errors
def status(run: RunName, as_json: AsJson = False, url: Url = HERE, key_env: KeyEnv = "POTSTILL_API_KEY") -> None:
    """Show where a run stands."""
    with _client(url, key_env) as client:
        _show(client.get_run(run), as_json)


@_one_line_errors
def list_(
    limit: Annotated[int, typer.Option(help="Newest runs to show.", min=1, max=100)] = 20,
    as_json: AsJson = False,
    url: Url = HERE,
    key_env: KeyEnv = "POTSTILL_API_KEY",
) -> None:
    """List runs, newest first."""
    with _client(url, key_env) as client:
        page = client.list_runs(limit=limit)
    if as_json:
        typer.echo(json.dumps(page))
        return
    for run in page["data"]:
        typer.echo(f"{run['id']:40} {run['status']:10} {run['created_at']}")


@_one_line_errors
def events(
    run: RunName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run ends.")] = False,
    after: Annotated[int, typer.Option(help="Begin behind this event.", min=0)] = 0,
    as_json: AsJson = False,
    url: Url = HERE,
    key_env: KeyEnv = "POTSTILL_API_KEY",
) -> None:
    """Show a run's events."""
    with _client(url, key_env) as client:
        if follow:
            for event in client.events(run, after=after):
                _show_event(event, as_json)
            return
        more = True
        while more:
            page = client.list_events(run, after=after)
            for event in page["data"]:
                _show_event(event, as_json)
                after = event["seq"]
            more = page["has_more"]


@_one_line_errors
def cancel(run: RunName, as_json: AsJson = False, url: Url = HERE, key_env: KeyEnv = "POTSTILL_API_KEY") -> None:
    """Ask a run to stop."""
    with _client(url, key_env) as client:
        _show(client.cancel_run(run), as_json)


def _client(url: str, key_env: str) -> Client:
    from potstill.client import Client

    key = os.environ.get(key_env)
    if not key:
        raise ConfigError(f"{key_env} is not set: put the API key there that `potstill serve` showed")
    return Client(url, key)


def _show(run: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(run))
        return
    typer.echo(f"{run['id']} is {run['status']}")
    if run["error"] is not None:
        typer.echo(f"{run['error']['category']}: {run['error']['message']}")
        if run["error"]["log_tail"]:
            typer.echo(run["error"]["log_tail"])


def _show_event(event: dict[str, Any], as_json: bool) -> None:
    line = f"{event['time']} {event['level']:7} {event['type']}: {event['message']}"
    typer.echo(json.dumps(event) if as_json else line)
