"""Keys that `potstill login` has kept: one for each service, in a file that only its owner can read.

    ~/.config/potstill/credentials.toml, or below XDG_CONFIG_HOME

    default = "https://potstill.example"      the service where no --url and no POTSTILL_URL names one

    [keys]
    "https://potstill.example" = "ps_…"

A key goes to the service that it was kept for, and to no other. Refuses a file that others can read.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from potstill.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What the file holds. URLs are without a slash at the end."""

    default: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)

    def key_for(self, url: str) -> str | None:
        return self.keys.get(url.rstrip("/"))

    def with_key(self, url: str, key: str) -> Credentials:
        """The same with another key, and its service the default."""
        return Credentials(default=url.rstrip("/"), keys={**self.keys, url.rstrip("/"): key})

    def without(self, url: str) -> Credentials:
        left = {known: key for known, key in self.keys.items() if known != url.rstrip("/")}
        return Credentials(default=self.default if self.default in left else None, keys=left)


def place() -> Path:
    """Of the file."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "potstill" / "credentials.toml"


def kept() -> Credentials:
    """What is kept; nothing where there is no file. Raises ConfigError for one that others can read, or wrong."""
    path = place()
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except FileNotFoundError:
        return Credentials()
    if mode & 0o077:
        raise ConfigError(f"{path}: others can read it: chmod 600 {path}")
    try:
        table = tomllib.loads(content.decode())
        default, keys = table.get("default"), dict(table.get("keys", {}))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, TypeError):
        raise ConfigError(f"{path}: cannot be read; `potstill login` makes a new one once it is removed") from None
    return Credentials(default=default, keys=keys)


def keep(credentials: Credentials) -> Path:
    """Put the file into place at once, readable by its owner alone."""
    path = place()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [] if credentials.default is None else [f"default = {_quoted(credentials.default)}", ""]
    lines += ["[keys]", *(f"{_quoted(url)} = {_quoted(key)}" for url, key in credentials.keys.items()), ""]
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("\n".join(lines))
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    return path


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's escapes are TOML's."""
    return json.dumps(text)
