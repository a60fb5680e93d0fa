"""The commands that read what a run says: events, logs, metrics, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from potstill.connection import KEY_ENV, KeyEnv, RunName, Url, connect
from potstill.console import AsJson, one_line_errors, say, show, show_json, show_json_line, show_table
from potstill.errors import ConfigError

if TYPE_CHECKING:
    from potstill.client import Client
    from potstill.client.resources import Event, Metrics

SHOWN_FIRST = ("loss", "reverse_kl", "accuracy", "tokens_per_second")  # of a run that has them
COLUMNS = 6
MOST_POINTS = 5000  # that the service sends at a time

Follow = Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run ends.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    for command in (events, logs, metrics, samples):
        app.command()(command)


@one_line_errors
def events(
    run: RunName,
    follow: Follow = False,
    after: Annotated[int, typer.Option(help="Begin behind this event.", min=0)] = 0,
    level: Annotated[str | None, typer.Option(help="Only debug, info, warn or error.")] = None,
    type: Annotated[str | None, typer.Option(help="Only this type, e.g. run.status.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Show a run's events. --json prints one a line."""
    with connect(url, key_env) as client:
        if follow:
            for event in client.events(run, after=after, level=level, type=type):
                _show_event(event, as_json)
            return
        more = True
        while more:
            page = client.list_events(run, after=after, level=level, type=type)
            for event in page["data"]:
                _show_event(event, as_json)
                after = event["seq"]
            more = page["has_more"]


@one_line_errors
def logs(
    run: RunName,
    follow: Follow = False,
    role: Annotated[str | None, typer.Option(help="orchestrator, learner, rollout or teacher.")] = None,
    rank: Annotated[int | None, typer.Option(help="Which of several, from 0.", min=0)] = None,
    tail: Annotated[int | None, typer.Option(help="The last lines only.", min=1)] = None,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Show what a run's processes wrote."""
    with connect(url, key_env) as client:
        pieces = (
            client.follow_logs(run, role=role, rank=rank, tail=tail)
            if follow
            else [client.get_logs(run, role=role, rank=rank, tail=tail)]
        )
        for piece in pieces:
            show(piece.removesuffix("\n"))


@one_line_errors
def metrics(
    run: RunName,
    keys: Annotated[str | None, typer.Option(help="Names, with commas between.")] = None,
    after_step: Annotated[int | None, typer.Option(help="Only later steps.", min=0)] = None,
    rows: Annotated[int, typer.Option(help="Of the table; where there are more steps, some.", min=2)] = 20,
    format: Annotated[
        Literal["table", "json", "csv", "parquet"], typer.Option(help="All but table: up to 5000 steps.")
    ] = "table",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File to write; of parquet there must be one.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Show a run's numbers by step, or write them to a file."""
    names = [name.strip() for name in keys.split(",")] if keys else []
    if format == "parquet" and out is None:
        raise ConfigError("--format parquet: name a file with -o")
    with connect(url, key_env) as client:
        if format == "csv" or format == "parquet":
            _write(client.export_metrics(run, format=format, keys=names, max_points=MOST_POINTS), out)
        elif as_json or format == "json":
            show_json(client.get_metrics(run, keys=names, after_step=after_step, max_points=MOST_POINTS))
        else:
            shown = names or _shown_first(client, run)
            _show_metrics(client.get_metrics(run, keys=shown, after_step=after_step), shown, rows)


@one_line_errors
def samples(
    run: RunName,
    step: Annotated[int | None, typer.Option(help="Only of this one; by default the newest.", min=0)] = None,
    limit: Annotated[int, typer.Option(help="Of them.", min=1, max=100)] = 5,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Print completions of a run with their scores, as JSON, one a line."""
    with connect(url, key_env) as client:
        for sample in client.list_samples(run, step=step, limit=limit)["data"]:
            show_json_line(sample)


def _show_event(event: Event, as_json: bool) -> None:
    if as_json:
        show_json_line(event)
        return
    for line in event["message"].splitlines() or [""]:
        show(f"{event['time']} {event['level']:7} {event['type']}: {line}")


def _write(content: bytes, out: Path | None) -> None:
    if out is None:
        show(content.decode().removesuffix("\n"))
    else:
        out.write_bytes(content)
        say(f"{out} is written")


def _shown_first(client: Client, run: str) -> list[str]:
    """What people look at first, as far as the run has it; what else there is is told beside the table."""
    known = client.get_metrics(run, keys=SHOWN_FIRST[:1])["keys"]
    shown = [name for name in SHOWN_FIRST if name in known] or known[:COLUMNS]
    left_out = [name for name in known if name not in shown]
    if left_out:
        say(f"also measured, for --keys: {', '.join(left_out)}")
    return shown


def _show_metrics(found: Metrics, names: list[str], rows: int) -> None:
    """A row a step: the first, the last and evenly many between."""
    steps = found["columns"]["step"]
    places: Sequence[int] = range(len(steps))
    if len(steps) > rows:
        places = [round(row * (len(steps) - 1) / (rows - 1)) for row in range(rows)]
    show_table(
        ["STEP", *names],
        [
            [_number("step", steps[place]), *(_number(name, found["columns"][name][place]) for name in names)]
            for place in places
        ],
    )


def _number(name: str, value: float | None) -> str:
    """As the run's own display shows it; a number that it does not know with four digits."""
    from potstill.metrics import METRICS

    if value is None:
        return "–"
    return METRICS[name].show(value) if name in METRICS else f"{value:.4g}"
