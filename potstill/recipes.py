"""Where the shipped configs are: beside the code in an installed package, in deploy/recipes in a checkout."""

from __future__ import annotations

from pathlib import Path

from potstill.errors import ConfigError


def folder() -> Path:
    """Raises ConfigError when neither place has them."""
    here = Path(__file__).parent
    for place in (here / "shipped_recipes", here.parent / "deploy" / "recipes"):
        if place.is_dir():
            return place
    raise ConfigError("the shipped recipes are missing: reinstall potstill, or run from a checkout")
