"""The commands about teachers: `potstill teacher serve` and `potstill teacher probe`. `register` adds them to an app.

A key is never an argument, where other users of the machine could read it, and is shown nowhere.
Imports nothing heavy before a command runs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from potstill.errors import ConfigError, TeacherError

teacher = typer.Typer(help="Serve a teacher, or find out what one can do.", no_args_is_help=True)

Place = Annotated[str, typer.Argument(help="Base URL of a teacher, without /v1, or a run config with its teachers.")]
Kind = Literal["server", "vllm", "completions", "openai"]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.add_typer(teacher, name="teacher")


@teacher.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(ctx: typer.Context, model: Annotated[str, typer.Argument(help="A model folder.")]) -> None:
    """Serve a model folder as a teacher on loopback, with a key. Options: `python -m teacher_server --help`."""
    from teacher_server.__main__ import main

    raise typer.Exit(main([model, *ctx.args]))


@teacher.command("probe")
def probe(
    place: Place,
    kind: Annotated[Kind | None, typer.Option(help="Recognised by its routes if not given.")] = None,
    model: Annotated[str | None, typer.Option(help="As the endpoint calls it; not of a server.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the teacher's tokenizer.")] = None,
    beside: Annotated[Path | None, typer.Option("--student", help="Model folder of a student to compare with.")] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Of kind completions, whose API has no word for it.")
    ] = None,
    key_env: Annotated[str | None, typer.Option(help="Variable with its key; POTSTILL_TEACHER_KEY.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a teacher what it really offers, and which methods it can serve. Exit 3 when it cannot be used.

    A teacher of kind openai writes two short answers, which cost a few tokens.
    """
    import asyncio

    from potstill.config_file import load
    from potstill.probing import asking

    say = functools.partial(typer.echo, err=True)
    wanted = asking.Wanted(
        kind=kind,
        model=model,
        tokenizer=tokenizer,
        student=beside,
        context_length=context_length,
        key_env=key_env,
    )
    if "://" in place:
        found = asyncio.run(asking.of_url(place, wanted, say=say))
    elif wanted == asking.Wanted():
        found = asyncio.run(asking.of_run(load(Path(place), []), say=say))
    else:
        raise ConfigError(f"{place} names its own teachers: options that say what one is go with a URL")
    if as_json:
        typer.echo(json.dumps(asking.as_json(found), indent=2))
    else:
        for one in found:
            typer.echo("\n".join(one.lines()))
    raise typer.Exit(0 if all(one.usable for one in found) else TeacherError.exit_code)
