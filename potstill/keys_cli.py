"""The commands about API keys: create, list, limit, rotate, revoke. All need an administrator's key.

A new key is shown once, on stdout, or written to a file that only its owner can read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potstill.connection import KEY_ENV, KeyEnv, Url, connect
from potstill.console import AsJson, one_line_errors, pairs, say, show, show_json, show_table
from potstill.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from potstill.client.resources import Key

keys = typer.Typer(help="API keys: make, list, renew and end them. For administrators.", no_args_is_help=True)

UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

KeyId = Annotated[str, typer.Argument(metavar="ID", help="Of the key, as `keys list` shows it.")]
KeyFile = Annotated[Path | None, typer.Option(help="Write the new key here, mode 0600, and do not show it.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.add_typer(keys, name="keys")


@keys.command("create")
@one_line_errors
def create(
    owner: Annotated[str, typer.Option(help="Whose runs it sees: a person or a team.")],
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    scopes: Annotated[
        str, typer.Option(help="What it lets its bearer do, with commas between.")
    ] = "runs:read,runs:write",
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="E.g. running=2 or gpu_hours=100; repeatable.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="After a while: 12h, 30d. By default never.")] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Make a key. It is shown once."""
    limits = _numbers(limit, "--limit")
    expires_in_s = None if expires is None else _seconds(expires)
    with connect(url, key_env) as client, Place(key_file) as place:
        made = client.create_key(
            owner=owner,
            label=label,
            scopes=[scope.strip() for scope in scopes.split(",")],
            limits=limits,
            expires_in_s=expires_in_s,
        )
        place.put(made, as_json)


@keys.command("list")
@one_line_errors
def list_(as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """List every key, the ended ones too."""
    with connect(url, key_env) as client:
        page = client.list_keys()
    if as_json:
        show_json(page)
        return
    show_table(
        ["ID", "OWNER", "LABEL", "SCOPES", "LIMITS", "CREATED", "ENDS"],
        [
            [
                key["id"],
                key["owner"],
                key["label"],
                " ".join(key["scopes"]),
                _limits(key),
                key["created_at"],
                f"revoked {key['revoked_at']}" if key["revoked_at"] else key["expires_at"] or "",
            ]
            for key in page["data"]
        ],
    )


@keys.command("limit")
@one_line_errors
def limit(
    key: KeyId,
    limits: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=NUMBER", help="All that it shall have; without any, none.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Set a key's limits, all of them: those that are left out are lifted."""
    with connect(url, key_env) as client:
        changed = client.update_key(key, limits=_numbers(limits, "limit"))
    show_json(changed) if as_json else show(f"{changed['id']} of {changed['owner']}: {_limits(changed)}")


@keys.command("rotate")
@one_line_errors
def rotate(
    key: KeyId,
    key_file: KeyFile = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Give a key another secret, shown once; the old one ends at once."""
    with connect(url, key_env) as client, Place(key_file) as place:
        place.put(client.rotate_key(key), as_json)


@keys.command("revoke")
@one_line_errors
def revoke(key: KeyId, as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """End a key. Its runs go on."""
    with connect(url, key_env) as client:
        ended = client.revoke_key(key)
    show_json(ended) if as_json else say(f"{key} of {ended['owner']} has ended")


class Place:
    """Where a new key goes. The file is made before the key is, so that no key is made that cannot be kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept = False

    def __enter__(self) -> Place:
        if self._path is not None:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        return self

    def put(self, key: Key, as_json: bool) -> None:
        if "key" not in key:
            raise ServiceError(
                f"key {key['id']} was made, and the answer that had it was lost: potstill keys rotate {key['id']}"
            )
        secret = key["key"]
        if self._path is not None:
            self._path.write_text(secret + "\n")
            self._kept = True
            key = {**key, "key": f"in {self._path}"}
        if as_json:
            show_json(key)
        else:
            say(
                f"key {key['id']} of {key['owner']}, shown once:"
                if self._path is None
                else f"key {key['id']} of {key['owner']}"
            )
            show(key["key"])

    def __exit__(self, *_raised: object) -> None:
        if self._path is not None and not self._kept:
            self._path.unlink()


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise ConfigError(f"--expires {text}: write a number and s, m, h or d, e.g. 30d")
    return float(int(found[1]) * UNIT_S[found[2]])


def _numbers(given: list[str] | None, option: str) -> dict[str, float]:
    """name=number, repeated. Raises ConfigError."""
    return {name: _number(f"{option} {name}={text}", text) for name, text in pairs(given, option).items()}


def _number(where: str, text: str) -> float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ConfigError(f"{where}: a number is needed") from None


def _limits(key: Key) -> str:
    return " ".join(f"{name}={value:g}" for name, value in key["limits"].items())
