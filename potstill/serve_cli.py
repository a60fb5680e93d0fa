"""The command `potstill serve`. Imports nothing heavy before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potstill.console import one_line_errors


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command()(serve)


@one_line_errors
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free port.", min=0, max=65535)] = 8000,
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    database: Annotated[
        str | None,
        typer.Option(help="SQLAlchemy URL; by default a SQLite file in --runs.", envvar="POTSTILL_DATABASE"),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Write a key that is made here, mode 0600, and do not show it.")
    ] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make another administrator's key.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another Host name to answer to; repeatable.")] = None,
    report_url: Annotated[str | None, typer.Option(help="How runs reach this service from the cluster.")] = None,
    models: Annotated[list[Path] | None, typer.Option(help="Folder below which runs may name models.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Folder below which runs may name data files.")] = None,
    secrets: Annotated[Path | None, typer.Option(help="Folder of secrets that teachers may name, one a file.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Prometheus metrics, without a key.", min=1, max=65535)] = None,
    admin_host: Annotated[str, typer.Option(help="Address of --admin-port.")] = "127.0.0.1",
    slots: Annotated[int | None, typer.Option(help="Runs at the same time; the others wait.", min=1)] = None,
) -> None:
    """Serve the API. Uses the Ray cluster at RAY_ADDRESS, or starts a Ray head of its own on loopback."""
    from orchestrator.service.serve import ServiceOptions, serve

    root = runs.resolve()
    options = ServiceOptions(
        host=host,
        port=port,
        runs=root,
        database=database or f"sqlite:///{root / 'potstill.db'}",
        key_file=key_file,
        new_key=new_key,
        allowed_hosts=tuple(allow_host or ()),
        report_url=report_url,
        models=tuple(path.resolve() for path in models or ()),
        data=tuple(path.resolve() for path in data or ()),
        secrets=secrets.resolve() if secrets is not None else None,
        admin_host=admin_host,
        admin_port=admin_port,
        slots=slots,
    )
    serve(options, typer.echo)
