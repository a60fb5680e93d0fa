"""Under which name a run is known elsewhere, kept in the run's folder so that a resumed run goes on there.

<run>/sinks/KIND.json      {"where": "http://127.0.0.1:5000", "id": "8c1f…"}
"""

from __future__ import annotations

import json
from pathlib import Path

from potstill.journal import write_json


def kept_id(path: Path, where: str) -> str | None:
    """The id that the run has at `where`; None where it has none yet, or the file does not say."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return kept["id"] if isinstance(kept, dict) and kept.get("where") == where else None


def keep_id(path: Path, where: str, id: str) -> None:
    """Raises RunError when the disk refuses."""
    write_json(path, {"where": where, "id": id})
