"""The smallest config that a service accepts."""

from __future__ import annotations

from typing import Any


def submitted(*, name: str = "one", seed: int = 0, steps: int = 3) -> dict[str, Any]:
    """A body for POST /v1/runs. For tests/tiny_run.py the seed says how the run goes."""
    return {
        "name": name,
        "seed": seed,
        "method": "sft",
        "student": {"model": "models/none"},
        "teacher": {"kind": "none"},
        "data": {"kind": "jsonl", "path": "data/none.jsonl"},
        "rollout": {"source": "reference", "prompts_per_step": 1, "sampling": {"max_new_tokens": 4}},
        "optim": {"lr": 1e-4},
        "loop": {"steps": steps},
    }
