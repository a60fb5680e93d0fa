"""How a command reaches its service: the options that say where, and the client that comes of them.

    URL   --url, POTSTILL_URL, the service of the last `potstill login`, or this machine
    key   the variable that --key-env names, by default POTSTILL_API_KEY; or the one that was kept for that URL

A key is never an argument, where other users of the machine could read it. Imports nothing heavy before a command runs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from potstill.errors import ConfigError

if TYPE_CHECKING:
    from potstill.client import Client

HERE = "http://127.0.0.1:8000"
KEY_ENV = "POTSTILL_API_KEY"

Url = Annotated[
    str | None,
    typer.Option(envvar="POTSTILL_URL", help="Base URL of the service.", show_default=f"the last login's, or {HERE}"),
]
KeyEnv = Annotated[str, typer.Option(help="Environment variable that holds the API key.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]


def connect(url: str | None, key_env: str) -> Client:
    """The client. Raises ConfigError where there is no key for that service."""
    from potstill.client import Client

    where = base_url(url)
    key = os.environ.get(key_env) or _kept_key(where)
    if not key:
        message = f"{key_env} is not set, and no key is kept for {where}: `potstill login` keeps one"
        raise ConfigError(message)
    return Client(where, key)


def base_url(url: str | None) -> str:
    """Which service is meant."""
    from potstill.credentials import kept

    return url or kept().default or HERE


def _kept_key(url: str) -> str | None:
    from potstill.credentials import kept

    return kept().key_for(url)
