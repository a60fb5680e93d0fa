"""Whether a command line of a manifest is one that the program would take. Parses it; starts nothing.

Knows `potstill`, `python -m teacher_server` and `ray start`. Refuses any other program with a ValueError.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import click
import typer.main
from ray.scripts.scripts import start
from typer._click.exceptions import ClickException

from potstill.cli import app
from teacher_server.__main__ import _parser


def refusal(words: Sequence[str]) -> str | None:
    """Why the program would not take it, or None."""
    match list(words):
        case ["potstill", "teacher", "serve", *rest] | ["python", "-m", "teacher_server", *rest]:
            return _argparse(rest)
        case ["potstill", *rest]:
            return _typer(rest)
        case ["ray", "start", *rest]:
            return _ray(rest)
    raise ValueError(f"not a program of ours: {' '.join(words)}")


def _typer(words: list[str]) -> str | None:
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]  # type: ignore[attr-defined]
    if hasattr(command, "commands"):
        return f"there is no command {' '.join(words)!r}"
    try:
        command.make_context(command.name, list(words))
    except ClickException as error:
        return error.format_message()
    return None


def _argparse(words: list[str]) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _parser().parse_args(words)
    except SystemExit:
        return said.getvalue().splitlines()[-1]
    return None


def _ray(words: list[str]) -> str | None:
    try:
        start.make_context("start", list(words))
    except click.ClickException as error:
        return error.format_message()
    return None
