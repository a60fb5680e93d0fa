"""What commands print: data on stdout, all else on stderr; rich tables on a terminal, plain columns anywhere else.

Text that others wrote is shown with its control characters made visible: a run's name, a message or a log can neither
forge a line nor speak to the terminal. Refuses tracebacks for what is somebody's mistake: it is one line.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from potstill.errors import ConfigError, PotstillError, ServiceError

P = ParamSpec("P")
R = TypeVar("R")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Show a mistake as one line on stderr, with what a service calls it, and exit with its code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except PotstillError as error:
            say(f"potstill: {_described(error)}")
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:  # of `potstill events … | head`: typer ends it without a word
            raise
        except OSError as error:  # a file of this machine: the client turns the network's into a ServiceError
            say(f"potstill: {error.filename or 'this machine'}: {error.strerror}")
            raise typer.Exit(ConfigError.exit_code) from None

    return wrapped


def say(line: str) -> None:
    """One line beside the data."""
    typer.echo(visible(line), err=True)


def show(text: str) -> None:
    """Lines of data; a line's end is the only control character that they keep."""
    typer.echo("\n".join(visible(line) for line in text.split("\n")))


def show_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def show_json_line(value: Any) -> None:
    typer.echo(json.dumps(value))


def show_yaml(value: Any) -> None:
    import yaml

    typer.echo(yaml.safe_dump(value, sort_keys=False, width=110, allow_unicode=True).rstrip())


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of text under their heads, the first of which names the row."""
    clean = [[visible(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _show_rich(heads, clean)
        return
    widths = [max([len(head), *(len(row[place]) for row in clean)]) for place, head in enumerate(heads)]
    for row in [list(heads), *clean]:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def visible(text: str) -> str:
    """The text on one line: control characters but tabs, and those that turn a line around, as escapes."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """name=value, repeated, as a mapping. Raises ConfigError for what has no =."""
    found: dict[str, str] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} {pair}: write name=value")
        found[name] = value
    return found


def _described(error: PotstillError) -> str:
    message = "; ".join(str(error).splitlines())
    if not isinstance(error, ServiceError):
        return message
    from potstill.client import Refused

    request = f"request {error.request_id}" if isinstance(error, Refused) and error.request_id else None
    remarks = ", ".join(remark for remark in (error.code, request) if remark)
    return f"{message} ({remarks})" if remarks else message


def _show_rich(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
