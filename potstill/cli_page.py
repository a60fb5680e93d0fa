"""docs/cli.md, made from the commands' own words: `python -m potstill.cli_page > docs/cli.md`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from typer import Context, Typer
from typer.models import ArgumentInfo, OptionInfo

from potstill.cli import app

HEAD = """# Commands

`potstill COMMAND --help` says the same. This page is made from it.

**The service.** Every command that speaks with one takes `--url` (or `POTSTILL_URL`; otherwise the service of the last
`potstill login`, or http://127.0.0.1:8000) and `--key-env`, the name of the variable that holds the API key
(`POTSTILL_API_KEY`). A key is never an argument: it comes from that variable, or from the file that `potstill login`
keeps (`~/.config/potstill/credentials.toml`, mode 0600), and goes to the service that it was kept for and no other.

**Output.** Data is on stdout, all else on stderr. On a terminal lists are tables; elsewhere they are plain columns.
`--json` prints what the service answered. Control characters in what others wrote are shown as escapes.

**Exit codes.** 0 done, 1 the run failed or something must be mended, 2 a setting is wrong, 3 the teacher, 4 the
service, 5 cancelled, 130 Ctrl-C. A mistake is one line on stderr; one that the service found ends with its code and the
request's id, under which its log has more.
"""
IN_COMMON = {"url", "key_env", "as_json"}
KINDS = {int: "N", float: "X", Path: "PATH"}


def page() -> str:
    """The whole page as Markdown."""
    lines = [HEAD, *_commands(app, "potstill", level=2)]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        lines += [f"## `potstill {group.name}`", "", str(group.typer_instance.info.help), ""]
        lines += _commands(group.typer_instance, f"potstill {group.name}", level=3)
    return "\n".join(lines)


def _commands(commands: Typer, name: str, *, level: int) -> Iterator[str]:
    for command in commands.registered_commands:
        assert command.callback is not None
        own = command.name or command.callback.__name__
        yield from _described(f"{name} {own}", command.callback, level=level)


def _described(name: str, callback: Callable[..., Any], *, level: int) -> Iterator[str]:
    """A command: how it is called, what it does, and the options that are its own."""
    hints = get_type_hints(callback, include_extras=True)
    parameters = {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(callback).parameters.items()
        if hints[name] is not Context
    }
    arguments = [_argument(name, *given) for name, given in parameters.items() if _info(given[0], ArgumentInfo)]
    yield f"{'#' * level} `{' '.join([name, *arguments])}`"
    yield ""
    yield " ".join((inspect.getdoc(callback) or "").split())
    own = [name for name in parameters if name not in IN_COMMON and _info(parameters[name][0], OptionInfo)]
    if own:
        yield ""
    for name in own:
        yield f"* {_option(name, *parameters[name])}"
    yield ""


def _argument(name: str, hint: Any, default: Any) -> str:
    shown = _info(hint, ArgumentInfo).metavar or name.upper()
    shown += "…" if _is_list(hint) else ""
    return shown if default is inspect.Parameter.empty else f"[{shown}]"


def _option(name: str, hint: Any, default: Any) -> str:
    info, kind = _info(hint, OptionInfo), _kind(hint)
    dashed = f"--{name.replace('_', '-')}"
    first = [info.default] if isinstance(info.default, str) else []  # typer takes the first name for one, here
    written = [*first, *(info.param_decls or ())]
    names = ", ".join(written or ([dashed, f"--no-{dashed[2:]}"] if kind is bool else [dashed]))
    if kind is not bool:
        names += f" {info.metavar or _value(kind)}"
    required = " Required." if default is inspect.Parameter.empty else ""
    is_said = default not in (None, "", inspect.Parameter.empty) and kind is not bool
    return f"`{names}` {info.help}{required}{f' Default: `{default}`.' if is_said else ''}"


def _info(hint: Any, kind: type) -> Any:
    """What typer was told of a parameter; None when it was told something of another kind."""
    metadata = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((info for info in metadata if isinstance(info, kind)), None)


def _kind(hint: Any) -> Any:
    """The type of one value: of `list[str] | None` it is str."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    inner = [kind for kind in get_args(hint) if kind is not NoneType]
    return hint if not inner or get_origin(hint) is Literal else _kind(inner[0])


def _is_list(hint: Any) -> bool:
    return "list[" in str(hint)


def _value(kind: Any) -> str:
    return "|".join(get_args(kind)) if get_origin(kind) is Literal else KINDS.get(kind, "TEXT")


if __name__ == "__main__":
    sys.stdout.write(page())
