"""Run folders as a run leaves them, with nothing trained: checkpoints of small files, logs, samples, hostile links."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = {
    "model/model.safetensors": bytes(range(256)) * 40,
    "model/config.json": b'{"model_type": "qwen3"}',
    "model/README.md": b"# A student\n",
    "trainer/state.json": b'{"version": 1}',
}

HOSTILE = [
    "..",
    ".",
    "",
    "../outside",
    "../../outside",
    "/etc/passwd",
    "//etc/passwd",
    "one/../../outside",
    "..\\outside",
    "%2e%2e%2foutside",
    "%2e%2e/outside",
    "..%00",
    "..\0",
    "outside\0.json",
    "model/config.json\0",
    "model//config.json",
    "model/./config.json",
    "model/../model/config.json",
    "model/../../../../outside",
    "model/config.json/",
    "/model/config.json",
    "model\\config.json",
    "～/x",
    "．．/outside",
    "..；/outside",
    "file:///etc/passwd",
    "model/config.json#",
    "model/config.json?x",
    " model/config.json",
    "con",
    "\udce4",
    "a" * 5000,
    "x/" * 3000,
]
"""Names with which somebody would leave a folder, in every place where a name stands."""


def make_checkpoint(run: Path, step: int, files: Mapping[str, bytes] = FILES) -> Path:
    """checkpoints/step-N of a run, with its manifest."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    facts = {name: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for name, c in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": facts}))
    return folder


def make_samples(run: Path, steps: Mapping[int, int], **more: Any) -> None:
    """samples.jsonl with so many rollouts of each step; `more` are fields of each."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "samples.jsonl").open("a") as file:
        for step, count in steps.items():
            for number in range(count):
                file.write(json.dumps(make_sample(step, number) | more) + "\n")


def make_sample(step: int, number: int) -> dict[str, Any]:
    token = {"text": " 21", "id": 5, "student_logprob": -0.5, "teacher_logprob": None, "version": step - 1}
    return {
        "step": step,
        "rollout_id": f"train-{step}/{number}",
        "prompt_id": f"train-{step}",
        "prompt": "12 + 9 = ?",
        "reward": 1.0,
        "finish_reason": "stop",
        "tokens": [token | {"trained": True}],
    }
