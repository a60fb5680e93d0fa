"""The command `potstill doctor`. Imports nothing heavy before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potstill.console import AsJson, one_line_errors, show, show_json
from potstill.errors import ConfigError

if TYPE_CHECKING:
    from potstill.doctor import Finding


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command()(doctor)


@one_line_errors
def doctor(
    security: Annotated[bool, typer.Option("--security", help="Only whether the service here is closed.")] = False,
    runs: Annotated[Path, typer.Option(help="As for `potstill serve`, as are the others.")] = Path("runs"),
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL; by default a SQLite file in --runs.")] = None,
    host: Annotated[str, typer.Option(help="Address that the service listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="And its port.", min=1, max=65535)] = 8000,
    secrets: Annotated[Path | None, typer.Option(help="Folder with one secret a file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check what this machine has for potstill, and the service on it. Exit 1 when something must be mended."""
    from potstill.doctor import examine

    findings = [] if security else examine()
    try:
        findings += _of_the_service(runs.resolve(), database, host, port, secrets, security=security)
    except ModuleNotFoundError as error:  # a client's machine: it has no service
        if security:
            raise ConfigError(f"{error.name} is missing: install potstill[orchestrator] for a service") from None
    if as_json:
        show_json([finding.as_dict() for finding in findings])
    else:
        for finding in findings:
            show(finding.as_line())
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def _of_the_service(
    runs: Path, database: str | None, host: str, port: int, secrets: Path | None, *, security: bool
) -> list[Finding]:
    from orchestrator.service import checkup, hardening

    place = checkup.Place(
        runs=runs,
        database=database or f"sqlite:///{runs / 'potstill.db'}",
        host=host,
        port=port,
        secrets=secrets,
    )
    return hardening.examine(place) if security else checkup.examine(place)
