"""The commands about this machine's access to a service: login, logout, whoami, open.

A key is read from a file or from stdin, never from the command line, where other users of the machine could see it.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from potstill.connection import KEY_ENV, KeyEnv, Url, base_url, connect
from potstill.console import AsJson, one_line_errors, say, show, show_json
from potstill.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    for command in (login, logout, whoami, open_):
        app.command(name=command.__name__.rstrip("_"))(command)


@one_line_errors
def login(
    key_file: Annotated[Path, typer.Option(help="File with the API key, mode 0600; - asks, or reads stdin.")] = Path(
        "-"
    ),
    url: Url = None,
) -> None:
    """Keep a key for a service, which then is the one by default. The key is tried first."""
    from potstill import credentials
    from potstill.client import Client

    where = base_url(url)
    key = _key_in(key_file)
    with Client(where, key) as client:
        me = client.who_am_i()
    path = credentials.keep(credentials.kept().with_key(where, key))
    say(f"{where} knows you as {me['owner']}; the key is kept in {path}")


@one_line_errors
def logout(url: Url = None) -> None:
    """Forget the key that is kept for a service. The key itself goes on: `potstill keys revoke` ends it."""
    from potstill import credentials

    where = base_url(url)
    before = credentials.kept()
    if before.key_for(where) is None:
        raise ConfigError(f"no key is kept for {where}")
    credentials.keep(before.without(where))
    say(f"the key for {where} is forgotten here")


@one_line_errors
def whoami(as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Show whose key is used, what it may, and what it has used."""
    with connect(url, key_env) as client:
        me = client.who_am_i()
    if as_json:
        show_json(me)
        return
    show(f"{me['owner']} at {base_url(url)}, key {me['id']}" + (f" ({me['label']})" if me["label"] else ""))
    show(f"scopes   {' '.join(me['scopes'])}")
    show(f"expires  {me['expires_at'] or 'never'}")
    used = me.get("usage", {})
    for name, limit in me["limits"].items():
        show(f"{name:16} {used[name]:g} of {limit:g}" if name in used else f"{name:16} at most {limit:g}")


@one_line_errors
def open_(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="The run's name; without one, all runs.")] = None,
    browser: Annotated[bool, typer.Option(help="Open it; otherwise only its address is printed.")] = True,
    url: Url = None,
) -> None:
    """Print the dashboard's address and open it in a browser."""
    from potstill.client.answers import path

    address = base_url(url).rstrip("/") + (path("runs", run) if run is not None else "/")
    show(address)
    if browser and not webbrowser.open(address):
        say("there is no browser here: open the address in one")


def _key_in(file: Path) -> str:
    """Raises ConfigError for a file that others can read."""
    if str(file) == "-":
        text = typer.prompt("API key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    else:
        with file.open() as opened:
            if os.fstat(opened.fileno()).st_mode & 0o077:
                raise ConfigError(f"{file}: others can read it: chmod 600 {file}")
            text = opened.readline()
    key = text.strip()
    if not key:
        raise ConfigError(f"{file}: there is no key in it")
    return key
