"""The smallest config that a service accepts, and the files that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def submitted(*, name: str = "one", seed: int = 0, steps: int = 3) -> dict[str, Any]:
    """A body for POST /v1/runs. For tests/tiny_run.py the seed says how the run goes."""
    return {
        "name": name,
        "seed": seed,
        "method": "sft",
        "student": {"model": "none"},
        "teacher": {"kind": "none"},
        "data": {"kind": "jsonl", "path": "none.jsonl"},
        "rollout": {"source": "reference", "prompts_per_step": 1, "sampling": {"max_new_tokens": 4}},
        "optim": {"lr": 1e-4},
        "loop": {"steps": steps},
    }


def small_files(folder: Path) -> None:
    """The model and the data of `submitted`: shaped like those of a real run, with nothing in them."""
    model, data = folder / "models" / "none", folder / "data"
    model.mkdir(parents=True, exist_ok=True)
    data.mkdir(exist_ok=True)
    save_file({"weight": np.zeros((1, 1), dtype=np.float32)}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (data / "none.jsonl").write_text(json.dumps({"prompt": "1 + 1 = ?", "solution": "2"}) + "\n")
