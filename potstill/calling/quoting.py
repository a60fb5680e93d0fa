"""What an endpoint quotes of what it was sent: taken out of its complaints before they become messages of ours.

A request may hold what only the teacher may read. Some servers repeat it when they refuse it, and an error is shown,
logged and kept. Short quotations stay: a message that names a setting or a model is one that can be acted on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_SHORT = 24  # characters that may be quoted in a row: fewer, and names of settings go; more, and sentences stay
_NAMES = {"model"}  # what is sent under these is no secret


def without_quotes(said: str, sent: bytes | None) -> str:
    """`said` with every run of characters that also stand in the JSON `sent` replaced by "…", where it is long."""
    texts = list(_texts(_parsed(sent)))
    kept, start = "", 0
    while start < len(said):
        end = start + _SHORT
        if end > len(said) or not (holding := [text for text in texts if said[start:end] in text]):
            kept, start = kept + said[start], start + 1
            continue
        while end < len(said) and any(said[start : end + 1] in text for text in holding):
            end += 1
        kept, start = f"{kept}…", end
    return kept


def _parsed(sent: bytes | None) -> Any:
    try:
        return json.loads(sent or b"null")
    except ValueError:  # potstill's own format, whose server quotes nothing
        return None


def _texts(value: Any) -> Iterator[str]:
    """Every text in it, and every list of token ids as it is written."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _NAMES:
                yield from _texts(inner)
    elif isinstance(value, list):
        yield json.dumps([one for one in value if isinstance(one, int)])
        for inner in value:
            yield from _texts(inner)
