"""What the pages of a run have in common: colours, and templates that escape every text and show what would hide in it.

The style sheet itself is templates/house.css.j2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined

# The light values of the page's variables; each value stands for one variable, so none may occur twice.
COLOURS = {
    "--ink": "#1d1d1b",
    "--muted": "#6b6a65",
    "--rule": "#dedad2",
    "--student": "#1f5f8b",
    "--student-pale": "#a8c4d8",
    "--control": "#b5641d",
    "--control-pale": "#e2c1a2",
}

# Characters that reorder text or take no room: who reads a page must see that they are there. The two joiners are
# letters of some scripts and of emoji, and stay between characters beyond ASCII.
_HIDING = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)


def environment(loader: BaseLoader | None = None) -> Environment:
    """Where the templates are; a name that a page forgot is an error, not an empty place."""
    return Environment(
        loader=loader or PackageLoader("orchestrator"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip


def visible(text: str) -> str:
    """The text with what would hide or reorder it as codes. Example: visible("a\\u202eb") == "a⟨U+202E⟩b"."""
    return _HIDING.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, JSON value). Example: {"optim": {"lr": 0.1}} gives [("optim.lr", "0.1")]."""
    if isinstance(value, Mapping) and value:
        return [
            row for key, inner in value.items() for row in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, json.dumps(value, ensure_ascii=False))] if prefix else []


def _shown(value: Any) -> Any:
    """What a template puts out: markup of our own as it is, every other text without hiding places."""
    return visible(value) if type(value) is str else value
