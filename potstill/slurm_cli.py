"""The command `potstill slurm render`. Imports nothing heavy before it runs. Refuses to write over the config."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from potstill.console import one_line_errors, say, show
from potstill.errors import ConfigError

slurm = typer.Typer(help="Runs as jobs of a Slurm cluster.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.add_typer(slurm, name="slurm")


@slurm.callback()
def group() -> None:
    """Keeps `render` a name of its own: typer folds a group of one command into it."""


@slurm.command()
@one_line_errors
def render(
    config: Annotated[Path, typer.Argument(help="A .toml, .yaml or .json run config.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, e.g. optim.lr=1e-4 loop.steps=20.", show_default=False)
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="By default as few as hold the run.", min=1)] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="By default what [resources] needs.", min=0)] = None,
    time: Annotated[str, typer.Option(help="Limit, as sbatch takes it; the run goes on after it.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="That pays for the job.")] = None,
    out: Annotated[Path | None, typer.Option(help="The script; by default NAME.sbatch here.")] = None,
) -> None:
    """Write a batch script for `sbatch`, and beside it the resolved config that it runs. The run is started here."""
    try:
        from orchestrator import slurm
        from orchestrator.service.toml import dump_toml
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: install potstill[orchestrator] to render a job") from None
    from potstill.config_file import load

    run = load(config, overrides or ())
    script = out if out is not None else Path(f"{run.name}.sbatch")
    resolved = script.with_name(f"{script.name}.toml")
    if config.resolve() in {script.resolve(), resolved.resolve()}:
        raise ConfigError(f"--out {script}: {config} would be overwritten")
    room = slurm.room(run, nodes=nodes, gpus_per_node=gpus_per_node)
    job = slurm.Job(
        room=room,
        time=time,
        partition=partition,
        account=account,
        python=sys.executable,
        folder=Path.cwd(),
        config=resolved.resolve(),
    )
    rendered = slurm.render(run, job)
    resolved.write_text(dump_toml(run.model_dump(mode="json")))
    script.write_text(rendered)
    say(f"{room.words} for {time}; submit it with sbatch")
    show(str(script))
