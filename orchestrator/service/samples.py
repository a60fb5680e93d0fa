"""The rollouts that a run kept to be looked at, token by token, newest first.

A run writes down nothing that only a teacher was shown. This file does not rest on that: a key that may not see such
text gets the fields that are known to hold none, and no others, whatever a run's folder says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.service import confined
from potstill.errors import ServiceError

FIELDS = frozenset(
    {
        "step",
        "rollout_id",
        "prompt_id",
        "domain",
        "origin",
        "prompt",
        "temperature",
        "teacher_reads",
        "reward",
        "finish_reason",
        "tokens",
    }
)
TOKEN_FIELDS = frozenset({"text", "id", "student_logprob", "teacher_logprob", "version", "trained", "chunk"})


def samples_of(runs: Path, run_id: str, *, privileged: bool) -> list[dict[str, Any]]:
    """All of them, newest step first, as the API shows them. `privileged`: with fields that a teacher alone saw.

    A run that went back to a checkpoint undid the steps after it, and their samples.
    """
    try:
        file = confined.open_file(runs, run_id, "samples.jsonl")
    except FileNotFoundError:
        return []
    with file:
        records = [_record(line) for line in file if line.endswith(b"\n")]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        step = record["step"]
        undone = {later for later in by_step if later > step}
        if record.get("rollout_id") in {other.get("rollout_id") for other in by_step.get(step, [])} - {None}:
            undone.add(step)
        for later in undone:
            del by_step[later]
        by_step.setdefault(step, []).append(record)
    return [
        _resource(record, position, privileged=privileged)
        for step in sorted(by_step, reverse=True)
        for position, record in enumerate(by_step[step])
    ]


def _resource(record: Mapping[str, Any], position: int, *, privileged: bool) -> dict[str, Any]:
    shown = dict(record) if privileged else {name: value for name, value in record.items() if name in FIELDS}
    if not privileged:
        shown["tokens"] = _known(record.get("tokens", []))
    return {"id": f"{record['step']}-{position}", "object": "run.sample", **shown}


def _known(tokens: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in token.items() if name in TOKEN_FIELDS} for token in tokens]


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        step = record["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    if not isinstance(step, int):
        raise ServiceError("the run's samples cannot be read: a line is no sample", 500, "samples_damaged")
    return dict(record)
