"""Where the shipped configs and templates are: beside the code in an installed package, in deploy/ in a checkout."""

from __future__ import annotations

from pathlib import Path

from potstill.errors import ConfigError


def folder() -> Path:
    """Of the configs. Raises ConfigError when neither place has them."""
    return shipped("recipes")


def shipped(name: str, package: Path = Path(__file__).parent) -> Path:
    """deploy/NAME. Raises ConfigError when neither place has it."""
    for place in (package / f"shipped_{name}", package.parent / "deploy" / name):
        if place.is_dir():
            return place
    raise ConfigError(f"the shipped {name} files are missing: reinstall potstill, or run from a checkout")
