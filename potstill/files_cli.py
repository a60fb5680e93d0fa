"""The commands about files at a service: put, list, get, rm."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from potstill.connection import KEY_ENV, KeyEnv, Url, connect
from potstill.console import AsJson, one_line_errors, say, show, show_json, show_table

files = typer.Typer(help="Data at the service: .jsonl and .parquet files that runs name by id.", no_args_is_help=True)

FileId = Annotated[str, typer.Argument(metavar="ID", help="E.g. file-….")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.add_typer(files, name="files")


@files.command("put")
@one_line_errors
def put(
    path: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file.")],
    purpose: Annotated[str, typer.Option(help="prompts, eval or fine-tune.")] = "prompts",
    name: Annotated[str | None, typer.Option(help="How it is called there; by default as here.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Upload a file and print its id, for data.path. It is read there to its end first: a mistake names its line."""
    with connect(url, key_env) as client:
        made = client.upload_file(path, purpose=purpose, filename=name)
    show_json(made) if as_json else show(made["id"])


@files.command("list")
@one_line_errors
def list_(
    limit: Annotated[int, typer.Option(help="Newest files to show.", min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Those behind this file, for the next page.")] = None,
    purpose: Annotated[str | None, typer.Option(help="Only of this purpose.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """List files, newest first."""
    with connect(url, key_env) as client:
        page = client.list_files(purpose=purpose, limit=limit, after=after)
    if as_json:
        show_json(page)
        return
    show_table(
        ["ID", "FILE", "PURPOSE", "ROWS", "BYTES", "CREATED"],
        [
            [
                item["id"],
                item["filename"],
                item["purpose"],
                str(item["rows"]),
                str(item["bytes"]),
                datetime.fromtimestamp(item["created_at"], UTC).isoformat().replace("+00:00", "Z"),
            ]
            for item in page["data"]
        ],
    )
    if page["has_more"]:
        say(f"there are more: --after {page['last_id']}")


@files.command("get")
@one_line_errors
def get(
    file: FileId,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="By default its own name, here.")] = None,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Fetch a file, verified."""
    with connect(url, key_env) as client:
        place = client.download_file(file, out or Path(Path(client.get_file(file)["filename"]).name))
    show(str(place))


@files.command("rm")
@one_line_errors
def rm(file: FileId, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Remove a file."""
    with connect(url, key_env) as client:
        client.delete_file(file)
    say(f"{file} is removed")
