"""The command `potstill database copy`: a backup of what the service keeps, or its move to another database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potstill.console import AsJson, one_line_errors, say, show_json

database = typer.Typer(help="The database of a service, on its machine.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.add_typer(database, name="database")


@database.callback()
def _group() -> None:
    """One command is a group, too."""


@database.command("copy")
@one_line_errors
def copy(
    to: Annotated[
        str, typer.Option(help="SQLAlchemy URL of an empty database.", envvar="POTSTILL_COPY_TO", show_default=False)
    ],
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    source: Annotated[
        str | None,
        typer.Option(
            "--database", help="SQLAlchemy URL; by default the SQLite file in --runs.", envvar="POTSTILL_DATABASE"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy everything as it is at one moment: a backup at any time; to move, stop the service first."""
    from orchestrator.service.store.copying import copy

    rows = copy(source or f"sqlite:///{runs.resolve() / 'potstill.db'}", to)
    if as_json:
        show_json({"rows": rows})
    else:
        say("copied " + ", ".join(f"{count:,} {name}" for name, count in rows.items() if count))
