"""What a run's black-box teachers have cost so far, from the files in which its workers count it."""

from __future__ import annotations

import json
from pathlib import Path


def spent_in(folder: Path) -> tuple[int, float]:
    """(tokens read and written, dollars) of all workers. A file that is not there yet counts as nothing."""
    tokens, pico_usd = 0, 0
    for path in folder.glob("spent-*.json"):
        counted = json.loads(path.read_bytes())  # replaced whole, never torn
        tokens += counted["tokens_in"] + counted["tokens_out"]
        pico_usd += counted["cost_pico_usd"]
    return tokens, pico_usd / 1e12
