"""What a run needs, what it will find, and what it will cost, before anything is started. Pure.

Refuses what cannot work, by name and with the nearest thing that would; never downgrades silently. Estimates are
marked as such.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from potstill.config import RunConfig, SelfTeacher, ServerTeacher
from potstill.errors import ConfigError, PlanError
from potstill.methods import PRESETS, Tier

SERVER_TIER = Tier.IDS  # what potstill's own teacher server offers over HTTP


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """plan.json. Bytes and tokens are estimates from the config and the model's config.json."""

    method: str
    source: str
    tier_needed: str
    tier_found: str
    student_parameters: int
    learner_bytes: int
    engine_bytes: int
    tokens_per_step_at_most: int
    tokens_at_most: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(config: RunConfig) -> Plan:
    """Raises PlanError when method, teacher and source do not fit together, ConfigError when a model is missing."""
    found = _tier_found(config)
    _refuse_unfit(config, found)
    parameters = num_parameters(Path(config.student.model))
    width = 4 if config.student.dtype == "float32" else 2
    rollout = config.rollout
    tokens = rollout.prompts_per_step * rollout.samples_per_prompt * rollout.sampling.max_new_tokens
    states = 2 + 2 * (4 / width) if config.student.lora is None else 1.1
    return Plan(
        method=config.method,
        source=rollout.source,
        tier_needed=config.objective.tier.name,
        tier_found=found.name,
        student_parameters=parameters,
        learner_bytes=int(parameters * width * states),
        engine_bytes=parameters * width,
        tokens_per_step_at_most=tokens,
        tokens_at_most=tokens * config.loop.steps,
        notes=tuple(_notes(config)),
    )


def num_parameters(folder: Path) -> int:
    """From the headers of the folder's safetensors files, without reading a weight."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model {str(folder)!r}: no *.safetensors there; name a folder in Hugging Face format")
    return sum(_count(file) for file in files)


def _count(file: Path) -> int:
    try:
        with safe_open(file, framework="numpy") as header:
            return sum(math.prod(header.get_slice(name).get_shape()) for name in header.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a readable safetensors file: {error}") from None


def _tier_found(config: RunConfig) -> Tier:
    if isinstance(config.teacher, SelfTeacher):
        return Tier.FULL
    return SERVER_TIER if isinstance(config.teacher, ServerTeacher) else Tier.TEXT


def _refuse_unfit(config: RunConfig, found: Tier) -> None:
    objective, source, teacher = config.objective, config.rollout.source, config.teacher
    if objective.tier > found:
        raise PlanError(
            f"method {config.method!r} needs a teacher of tier {objective.tier.name}, this one offers {found.name}; "
            f"methods that it can serve: {', '.join(_served(found))}"
        )
    if isinstance(teacher, SelfTeacher) and objective.divergence != "nll" and objective.support != "full":
        raise PlanError('a self-teacher lives inside the learner: use objective.support = "full", e.g. method "opsd"')
    if source == "teacher" and not isinstance(teacher, SelfTeacher) and getattr(teacher, "model", None) is None:
        raise PlanError('rollout.source = "teacher" needs teacher.model, a folder that a rollout worker can load')
    if source != "student" and objective.divergence != "nll":
        raise PlanError(f'rollout.source = "{source}" is supervised: use method "sft", or let the student write')
    if config.rollout.privileged_share and (source != "reference" or not isinstance(teacher, SelfTeacher)):
        raise PlanError('rollout.privileged_share needs source = "reference" and a [teacher] of kind "self"')
    if source == "student" and objective.divergence == "nll":
        raise PlanError(
            'method "sft" on the student\'s own text teaches nothing: rollout.source = "teacher" or "reference"'
        )
    if source == "student" and config.rollout.sampling.temperature == 0:
        raise PlanError("rollout.sampling.temperature = 0 never explores: on-policy distillation samples, at 1.0")


def _served(found: Tier) -> list[str]:
    return [name for name, method in PRESETS.items() if method.objective.tier <= found]


def _notes(config: RunConfig) -> list[str]:
    notes = []
    sampling = config.rollout.sampling
    if config.rollout.source == "student" and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.temperature != 1):
        notes.append("rollouts are not drawn from the student at temperature 1: states differ, the loss is still of q")
    if config.objective.support == "sampled" and config.objective.divergence == "reverse_kl":
        notes.append("sampled-token gradients are noisy: use a smaller learning rate than for a top-k method")
    if config.eval.items == 0:
        notes.append("eval.items = 0: no held-out accuracy will be measured")
    return notes
