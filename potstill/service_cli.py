"""The commands that speak with a service, and the one that is it. `register` adds them to an app.

    serve_cli.py     serve                             checkpoints_cli.py   checkpoints list|get|publish|…
    runs_cli.py      submit status list cancel …       files_cli.py         files put|list|get|rm
    watch_cli.py     events logs metrics samples       teachers_cli.py      teachers add|list|probe|rm
    access_cli.py    login logout whoami open          keys_cli.py          keys create|list|rotate|…
    database_cli.py  database copy

Data goes to stdout, all else to stderr (console.py); URL and key come from connection.py. Imports nothing heavy before
a command runs.
"""

from __future__ import annotations

import typer

from potstill import (
    access_cli,
    checkpoints_cli,
    database_cli,
    files_cli,
    keys_cli,
    runs_cli,
    serve_cli,
    teachers_cli,
    watch_cli,
)


def register(app: typer.Typer) -> None:
    """Add all of them to `app`."""
    for commands in (
        serve_cli,
        runs_cli,
        watch_cli,
        checkpoints_cli,
        files_cli,
        teachers_cli,
        keys_cli,
        access_cli,
        database_cli,
    ):
        commands.register(app)
