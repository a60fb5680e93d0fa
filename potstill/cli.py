"""The command `potstill`. Reads arguments, calls one thing, prints its result; everything heavy is imported on use.

Exit codes: 0 done · 1 the run failed · 2 a setting is wrong · 3 the teacher · 4 the service · 5 cancelled · 130 Ctrl-C.
A mistake of the user is one line on stderr that says what to do, never a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from potstill import __version__, doctor_cli, service_cli, slurm_cli, teacher_cli
from potstill.errors import ConfigError, PotstillError

CANCELLED = 5

app = typer.Typer(
    name="potstill",
    help="On-policy distillation of language models as a service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
service_cli.register(app)
teacher_cli.register(app)
doctor_cli.register(app)
slurm_cli.register(app)

Config = Annotated[Path, typer.Argument(help="A .toml, .yaml or .json run config.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, e.g. optim.lr=1e-4 loop.steps=20.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A run that is told to end is cancelled from within: one line and an exit code of its own."""
    import asyncio

    try:
        yield
    except asyncio.CancelledError:
        typer.echo("potstill: stopped", err=True)
        raise typer.Exit(CANCELLED) from None


@app.command()
@ended_by_sigterm()
def run(
    config: Config,
    overrides: Overrides = None,
    report_to: Annotated[str | None, typer.Option(help="URL of the service that follows this run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in its folder.")] = False,
    resume_if_begun: Annotated[
        bool, typer.Option("--resume-if-begun", help="Go on with the run that is in its folder, or begin it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a config here, on RAY_ADDRESS or a local Ray; the result is in <runs>/<name>."""
    from orchestrator import foreground
    from potstill.config_file import load
    from potstill.journal import has_begun

    resolved = load(config, overrides or [])
    resume = resume or (resume_if_begun and has_begun(Path(resolved.runs) / resolved.name))
    report = foreground.run(resolved, report_to=report_to, quiet=as_json, resume=resume)
    if report is None:
        typer.echo(f"potstill: {resolved.name} was asked to stop; go on with --resume", err=True)
    elif as_json:
        print_json(report)


@app.command()
def check(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the resolved config, the plan and one decoded sample with its loss mask; start nothing."""
    from potstill.config_file import load
    from potstill.inspection import decoded_sample
    from potstill.planner import plan
    from potstill.sinks.opening import ready

    resolved = load(config, overrides or [])
    ready(resolved.sinks)
    found = {
        "config": resolved.model_dump(mode="json"),
        "plan": plan(resolved).as_dict(),
        "sample": decoded_sample(resolved).as_dict(),
    }
    if as_json:
        print_json(found)
        return
    print_yaml({"config": found["config"]})
    print_yaml({"plan (sizes are estimates)": found["plan"]})
    typer.echo(decoded_sample(resolved).as_text())


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Of a method, for all that it is.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the methods and what each needs of a run, or show one."""
    from potstill.methods import PRESETS
    from potstill.nearest import hint

    if name is not None and name not in PRESETS:
        raise ConfigError(f"method {name!r} is not known{hint(name, PRESETS)}")
    shown = {name: PRESETS[name]} if name is not None else PRESETS
    if as_json:
        print_json({key: method.as_dict() for key, method in shown.items()})
    elif name is not None:
        print_yaml({name: shown[name].as_dict()})
    else:
        for key, method in shown.items():
            needs = ", ".join(f"{what}: {how}" for what, how in method.needs.items())
            typer.echo(f"{key:<24}{method.phrase}\n{'':<24}needs {needs}")
        typer.echo("\n`potstill methods NAME` shows a method's objective, source and settings.")


@app.command()
@ended_by_sigterm()
def quickstart(
    recipe: Annotated[
        str,
        typer.Option(
            help="opd: a teacher and a student; opsd: the student alone; a teacher that only writes: seqkd, soda, gad, "
            "ranked, advised; cross_tokenizer; two_teachers."
        ),
    ] = "opd",
    engine: Annotated[str | None, typer.Option(help="vllm or transformers.")] = None,
    seed: Annotated[int, typer.Option(help="Of the student's warm-up and of the distillation.")] = 0,
    runs: Annotated[Path, typer.Option(help="Where runs and cached models go.")] = Path("runs"),
    models_only: Annotated[
        bool, typer.Option("--models-only", help="Make what it begins with, into RUNS/models, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Distil a small student on this machine, from nothing, beside its controls; ends with a report."""
    from orchestrator import quickstart as recipes

    asked = recipes.Asked(name=recipe, engine=engine, seed=seed, runs=runs, quiet=as_json)
    if models_only:
        made = recipes.make_models(asked)
        print_json(made) if as_json else typer.echo(recipes.shelf_summary(made))
        return
    report = recipes.run(asked)
    print_json(report) if as_json else typer.echo(recipes.summary(report, runs))


@app.command()
def timeline(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, <runs>/<name>.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where the page goes; by default timeline.html in RUN.")] = None,
    after: Annotated[float | None, typer.Option("--from", help="Seconds since the run began.", min=0)] = None,
    until: Annotated[float | None, typer.Option("--to", help="Seconds since the run began.", min=0)] = None,
    as_json: Json = False,
) -> None:
    """Draw when each process of a run worked and for whom it waited: its last ten minutes, or from --from to --to."""
    from orchestrator.timeline import read_bubbles, write_timeline

    if as_json:
        print_json(read_bubbles(run, after=after, until=until).as_dict())
        return
    page = out or run / "timeline.html"
    report = write_timeline(run, page, after=after, until=until)
    typer.echo("\n".join([report.verdict, *report.remarks, str(page)]))


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def print_json(value: Any) -> None:
    from potstill.journal import finite

    typer.echo(json.dumps(finite(value), indent=2))


def print_yaml(value: Any) -> None:
    import yaml

    typer.echo(yaml.safe_dump(value, sort_keys=False, width=110, allow_unicode=True).rstrip())


def main() -> None:
    """Entry point: errors of ours become one line and an exit code; typer ends all else, Ctrl-C with 130."""
    try:
        app()
    except PotstillError as error:
        typer.echo(f"potstill: {error}", err=True)
        sys.exit(error.exit_code)
