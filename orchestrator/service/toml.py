"""A config as the TOML that `potstill run` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w


def dump_toml(config: Mapping[str, Any]) -> str:
    """Without the settings that are None, which TOML cannot say: left out they mean the same."""
    return tomli_w.dumps(_set(config))


def _set(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _set(value) if isinstance(value, Mapping) else value for name, value in table.items() if value is not None
    }
