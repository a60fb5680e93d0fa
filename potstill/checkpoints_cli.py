"""The commands about a run's checkpoints: list, get, publish, withdraw, ttl, rm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potstill.connection import KEY_ENV, KeyEnv, RunName, Url, connect
from potstill.console import AsJson, one_line_errors, say, show, show_json, show_table
from potstill.errors import ConfigError

if TYPE_CHECKING:
    from potstill.client import Client
    from potstill.client.resources import Checkpoint

checkpoints = typer.Typer(
    help="What a run has saved: look at it, fetch it, publish it, remove it.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="E.g. step-000123, or `latest`.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.add_typer(checkpoints, name="checkpoints")


@checkpoints.command("list")
@one_line_errors
def list_(run: RunName, as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """List a run's checkpoints, newest first."""
    with connect(url, key_env) as client:
        page = client.list_checkpoints(run)
    if as_json:
        show_json(page)
        return
    show_table(
        ["NAME", "STEP", "KIND", "STATUS", "MIB", "CREATED", "EXPIRES", "PUBLISHED AS"],
        [
            [
                item["id"],
                str(item["step"]),
                item["kind"],
                item["status"],
                f"{item['bytes'] / 2**20:.1f}",
                item["created_at"] or "",
                item["expires_at"] or "",
                item["published_as"] or "",
            ]
            for item in page["data"]
        ],
    )


@checkpoints.command("get")
@one_line_errors
def get(
    run: RunName,
    name: Name,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to make; by default ./RUN-NAME.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Fetch a checkpoint into a new folder; every file is verified. One that broke off goes on when asked again.

    The folder's model/ loads in transformers and vLLM.
    """
    with connect(url, key_env) as client:
        named = _named(client, run, name)
        place = client.download_checkpoint(run, named, out or Path(f"{run}-{named}"))
    show_json({"run": run, "checkpoint": named, "folder": str(place)}) if as_json else show(str(place))


@checkpoints.command("publish")
@one_line_errors
def publish(
    run: RunName,
    name: Name,
    as_name: Annotated[str, typer.Argument(metavar="AS", help="How other runs name it as their model.")],
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Give a checkpoint a name under which other runs can begin with it."""
    with connect(url, key_env) as client:
        _show(client.publish_checkpoint(run, _named(client, run, name), as_name=as_name), as_json)


@checkpoints.command("withdraw")
@one_line_errors
def withdraw(run: RunName, name: Name, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Take that name back; the checkpoint stays."""
    with connect(url, key_env) as client:
        named = _named(client, run, name)
        client.withdraw_checkpoint(run, named)
    say(f"{named} of {run} is no longer published")


@checkpoints.command("ttl")
@one_line_errors
def ttl(
    run: RunName,
    name: Name,
    seconds: Annotated[str, typer.Argument(help="For how long it is kept from now on, or `none`: for ever.")],
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Say when a checkpoint may be removed."""
    if seconds != "none" and not seconds.isdecimal():
        raise ConfigError(f"{seconds!r}: a number of seconds, or none")
    with connect(url, key_env) as client:
        kept = client.set_checkpoint_ttl(
            run, _named(client, run, name), seconds=None if seconds == "none" else int(seconds)
        )
    _show(kept, as_json)


@checkpoints.command("rm")
@one_line_errors
def rm(run: RunName, name: Name, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Remove a checkpoint."""
    with connect(url, key_env) as client:
        named = _named(client, run, name)
        client.delete_checkpoint(run, named)
    say(f"{named} of {run} is removed")


def _named(client: Client, run: str, name: str) -> str:
    """The checkpoint's own name. Raises ConfigError when a run has none for `latest`."""
    if name != "latest":
        return name
    ready = [item for item in client.list_checkpoints(run)["data"] if item["status"] == "ready"]
    if not ready:
        raise ConfigError(f"{run} has no checkpoint yet")
    return max(ready, key=lambda item: item["step"])["id"]


def _show(checkpoint: Checkpoint, as_json: bool) -> None:
    if as_json:
        show_json(checkpoint)
        return
    remarks = [f"of {checkpoint['run']}, step {checkpoint['step']}"]
    if checkpoint["published_as"]:
        remarks.append(f"published as {checkpoint['published_as']}")
    remarks.append(f"kept until {checkpoint['expires_at']}" if checkpoint["expires_at"] else "kept")
    show(f"{checkpoint['id']} {', '.join(remarks)}")
