"""The model card beside a checkpoint: where the weights come from, in a form that model hubs read. Pure text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from potstill import __version__
from potstill.config import RunConfig
from potstill.methods import PRESETS

_NOT_SHOWN: dict[str, Any] = {
    "privileged_template": True,
    "instruction": True,
    "ranking": True,
    "advisor": {"instruction"},
}
"""Of [teacher]: what is said to a teacher alone, which a card would publish with the weights."""


def model_card(config: RunConfig, *, step: int, tokens_trained: int, accuracy: Mapping[str, float]) -> str:
    """Markdown with a YAML head. An accuracy that was not measured is said to be so."""
    head = yaml.safe_dump(
        {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "base_model": config.student.model,
            "tags": ["on-policy-distillation", "potstill", config.method],
        },
        sort_keys=False,
    )
    measured = ", ".join(f"{stage} {value:.1%}" for stage, value in accuracy.items()) or "not measured"
    rows = {
        "Method": f"`{config.method}`: {PRESETS[config.method].phrase} ({PRESETS[config.method].source})",
        "Student at the start": f"`{config.student.model}`",
        "Teacher": f"`{config.teacher.model_dump_json(exclude=_NOT_SHOWN)}`",
        "Data": f"`{config.data.model_dump_json()}`",
        "Trained": f"{step} steps, {tokens_trained:,} tokens, seed {config.seed}",
        "Held-out accuracy": measured,
        "Made by": f"potstill {__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"---\n{head}---\n\n# {config.name}\n\n| | |\n|---|---|\n{table}\n"
