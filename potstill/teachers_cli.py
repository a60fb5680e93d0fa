"""The commands about teachers that a service knows: add, list, probe, rm. (`potstill teacher` is about any teacher.)"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.connection import KEY_ENV, KeyEnv, Url, connect
from potstill.console import AsJson, one_line_errors, say, show_json, show_table, show_yaml
from potstill.errors import ConfigError

if TYPE_CHECKING:
    from potstill.client.resources import Teacher

teachers = typer.Typer(help="Teachers that the service knows by name, for all its runs.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="How runs name it.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.add_typer(teachers, name="teachers")


@teachers.command("add")
@one_line_errors
def add(
    name: Name,
    config: Annotated[
        Path | None, typer.Argument(help="A file with a [teacher] table; or say it with options.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="server, vllm, completions or openai.")] = None,
    teacher_url: Annotated[str | None, typer.Option("--at", help="Its base URL, without /v1.")] = None,
    model: Annotated[str | None, typer.Option(help="As the endpoint calls it.")] = None,
    secret_ref: Annotated[
        str | None, typer.Option(help="Where the service has its key: env:NAME or file:NAME.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another setting of the table; repeatable.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Register a teacher for everybody's runs. Its key stays where the service has it."""
    options = {"kind": kind, "url": teacher_url, "model": model, "secret_ref": secret_ref}
    table = _table(config, {key: value for key, value in options.items() if value is not None}, setting or [])
    with connect(url, key_env) as client:
        made = client.register_teacher(name, table)
    show_json(made) if as_json else say(
        f"{name} is registered; `potstill teachers probe {name}` finds out what it can do"
    )


@teachers.command("list")
@one_line_errors
def list_(as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """List the teachers that a run may name."""
    with connect(url, key_env) as client:
        page = client.list_teachers(limit=100)
    if as_json:
        show_json(page)
        return
    rows = []
    for teacher in page["data"]:
        config = teacher["teacher"]
        rows.append(
            [teacher["id"], config.get("kind", ""), config.get("url", ""), config.get("model") or "", _found(teacher)]
        )
    show_table(["NAME", "KIND", "AT", "MODEL", "PROBED"], rows)


@teachers.command("probe")
@one_line_errors
def probe(
    name: Name,
    tokenizer: Annotated[str | None, typer.Option(help="A model there with its tokenizer; not of a server.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Have the service ask a teacher what it really offers. One that only writes is paid for two short answers."""
    with connect(url, key_env) as client:
        found = client.probe_teacher(name, tokenizer=tokenizer)
    show_json(found) if as_json else show_yaml({name: found.get("probe", found)})


@teachers.command("rm")
@one_line_errors
def rm(name: Name, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Remove a teacher."""
    with connect(url, key_env) as client:
        client.delete_teacher(name)
    say(f"{name} is removed")


def _table(config: Path | None, options: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """A [teacher] table: a file's, and options on top."""
    from potstill.config_file import apply_override, read_mapping
    from potstill.submission import split_override

    table: dict[str, Any] = {}
    if config is not None:
        table = read_mapping(config).get("teacher")  # type: ignore[assignment]
        if not isinstance(table, dict):
            raise ConfigError(f"{config}: there is no [teacher] table in it")
    table = {**table, **options}
    for override in settings:
        key, value = split_override(override)
        apply_override(table, key, value)
    if not table:
        raise ConfigError("say what the teacher is: a file with a [teacher] table, or --kind, --at and --model")
    return table


def _found(teacher: Teacher) -> str:
    probe = teacher["probe"]
    if probe is None:
        return "not yet"
    return "; ".join(map(str, probe.get("problems", ()))) or str(probe.get("tier", "yes"))
