"""What a run needs, what it will find, and what it will cost, before anything is started. Pure.

Refuses what cannot work, by name and with the nearest thing that would; never downgrades silently. Estimates are
marked as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from potstill.algebra.judges import Discriminator
from potstill.algebra.objective import ESTIMATES, Tier
from potstill.config import RunConfig
from potstill.config_resources import worded
from potstill.config_teachers import ServerTeacher, SeveralTeachers, TeacherConfig
from potstill.errors import ConfigError, PlanError
from potstill.methods import PRESETS
from potstill.misfits import misfits
from potstill.transports.route import route_of
from potstill.wire import Capabilities

CLAIMED = {
    "server": Tier.IDS,  # FULL where its head is known
    "vllm": Tier.IDS,
    "completions": Tier.TOPK,
    "several": Tier.IDS,
    "openai": Tier.TEXT,
    "self": Tier.FULL,
    "local": Tier.FULL,
    "none": Tier.TEXT,
}

WIDTH = {"float32": 4, "bfloat16": 2}
TRAINED_BYTES = 16  # of a parameter that AdamW moves: itself, its gradient and two moments, in float32


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
    weights: str
    layout: str
    asks: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(config: RunConfig) -> Plan:
    """Raises PlanError when method, teacher and source do not fit together, ConfigError when a model is missing."""
    found = _tier_found(config)
    _refuse_unfit(config, found)
    parameters = num_parameters(Path(config.student.model))
    rollout = config.rollout
    tokens = rollout.prompts_per_step * rollout.samples_per_prompt * rollout.sampling.max_new_tokens
    return Plan(
        method=config.method,
        source=rollout.source,
        tier_needed=config.objective.tier.name,
        tier_found=found.name,
        student_parameters=parameters,
        learner_bytes=_learner_bytes(config, parameters),
        engine_bytes=parameters * WIDTH[config.student.dtype],
        tokens_per_step_at_most=tokens,
        tokens_at_most=tokens * config.loop.steps,
        weights=_weights(config),
        layout=config.resources.layout,
        asks=tuple(_asks(config)),
        notes=tuple(_notes(config)),
    )


def _learner_bytes(config: RunConfig, parameters: int) -> int:
    """Weights, gradients and two moments in float32, beside what the passes read where that is bfloat16; activations
    are not counted. Of an adapter, what it adds is small."""
    width = WIDTH[config.student.dtype]
    if config.student.lora is not None:
        return int(parameters * width * 1.1)
    states = TRAINED_BYTES if config.student.dtype == "float32" else TRAINED_BYTES + width
    judged = TRAINED_BYTES if isinstance(config.objective.judge, Discriminator) else 0
    return parameters * (states + judged)


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
    """What teachers of this kind offer at best; the one that is met is asked itself (`check_teacher`)."""
    teacher = config.teacher
    sends_states = isinstance(teacher, ServerTeacher) and teacher.head_folder is not None
    return Tier.FULL if sends_states else CLAIMED[teacher.kind]


def check_teacher(config: RunConfig, able: Capabilities) -> None:
    """Raise PlanError when the teacher that was met does not offer what the method reads, or not of texts so long."""
    objective, rollout = config.objective, config.rollout
    offered = Tier(able.tier) if able.hidden_size else min(Tier.IDS, Tier(able.tier))
    if objective.tier > offered:
        raise PlanError(
            f"method {config.method!r} needs a teacher of tier {objective.tier.name}, {able.model} offers "
            f"{offered.name}; nearest that it can serve: {', '.join(nearest(config.method, offered))}"
        )
    supports = [term.support for term in objective.terms.values() if term.reads_scores]
    for width in ("k", "m"):
        wanted = max((getattr(support, width, 0) for support in supports), default=0)
        if wanted > able.max_top_k and objective.tier < Tier.FULL:
            raise PlanError(
                f"objective.support.{width} is {wanted}: {able.model} sends at most {able.max_top_k} a position"
            )
    if rollout.source == "revision" and (offered < Tier.IDS or rollout.revision_k > able.max_top_k):
        raise PlanError(
            f'rollout.source = "revision" asks for log-probs of rollout.revision_k = {rollout.revision_k} ids of the '
            f"student's choice: {able.model} offers {offered.name} and at most {able.max_top_k} a position"
        )
    num_prompt, num_new = rollout.max_prompt_tokens, rollout.sampling.max_new_tokens
    if num_prompt + num_new > able.context_length:
        raise PlanError(
            f"teacher {able.model} reads {able.context_length} tokens: lower rollout.max_prompt_tokens {num_prompt} or "
            f"rollout.sampling.max_new_tokens {num_new}, which make {num_prompt + num_new}; a privileged prompt may "
            "need more"
        )


def _refuse_unfit(config: RunConfig, found: Tier) -> None:
    objective = config.objective
    if objective.tier > found:
        nameless = isinstance(config.teacher, ServerTeacher) and config.teacher.keeps_head
        more = ", and FULL once teacher.head names the model that it serves" if nameless else ""
        raise PlanError(
            f"method {config.method!r} needs a teacher of tier {objective.tier.name}, this one offers {found.name}"
            f"{more}; nearest that it can serve: {', '.join(nearest(config.method, found))}"
        )
    for problem in misfits(config):
        raise PlanError(problem)


def nearest(name: str, found: Tier) -> list[str]:
    """Up to three methods that a teacher of this tier can serve, most like `name` first."""
    wanted = PRESETS[name]

    def unlike(other: str) -> tuple[int, int]:
        method = PRESETS[other]
        same = (
            method.context == wanted.context,
            method.signal == wanted.signal,
            method.objective.loss.kind == wanted.objective.loss.kind,
            method.objective.over == wanted.objective.over,
        )
        more = len(method.needs.keys() - wanted.needs.keys())
        return more - sum(same), -method.objective.tier

    able = [other for other, method in PRESETS.items() if method.objective.tier <= found]
    return sorted((other for other in able if other != name), key=unlike)[:3]


def _weights(config: RunConfig) -> str:
    """How new weights will travel; which hosts there are is known once the cluster is, and in the first event."""
    if config.weights.transport == "auto":
        near, far = (route_of(config, same_host=near).transport for near in (True, False))
        return near if near == far else f"{near} on one host, {far} between hosts"
    route = route_of(config, same_host=True)
    return f"{route.transport}: {route.reason}"


def _asks(config: RunConfig) -> Iterator[str]:
    """What the processes of the run want of a cluster."""
    resources, ranks, workers = config.resources, config.learner.ranks, config.rollout.workers
    learner, worker = resources.learner.needs, resources.rollout.needs
    together = f", together or not at all ({resources.strategy})" if learner else ""
    yield f"learner: {_times(ranks, 'rank')} with {worded(learner)}{together}"
    beside = f", {min(ranks, workers)} in the bundle of a rank" if resources.layout == "colocated" else ""
    fewest = min(config.rollout.min_workers, workers)
    begins = f", {fewest} to begin with" if fewest < workers else ""
    yield f"rollout: {_times(workers, 'worker')} with {worded(worker)}{beside}{begins}"


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s each" * (count > 1)


def _notes(config: RunConfig) -> list[str]:
    notes = []
    sampling = config.rollout.sampling
    if config.rollout.source == "student" and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.temperature != 1):
        notes.append("rollouts are not drawn from the student at temperature 1: states differ, the loss is still of q")
    if isinstance(config.objective.loss, ESTIMATES):
        notes.append("sampled-token gradients are noisy: use a smaller learning rate than for a top-k method")
    if config.eval.items == 0:
        notes.append("eval.items = 0: no held-out accuracy will be measured")
    resources = config.resources
    if (resources.learner.gpus or resources.rollout.gpus) and _starts_server(config.teacher):
        notes.append("Ray knows nothing of the teacher that this run starts: it uses the first GPU, whoever holds that")
    resolved = config.model_dump()
    for key, wanted in PRESETS[config.method].settings.items():
        if (found := _at(resolved, key)) != wanted:
            notes.append(f"the paper of {config.method!r} has {key} = {wanted!r}, this run {found!r}")
    return notes


def _starts_server(teacher: TeacherConfig) -> bool:
    tables = [one.teacher for one in teacher.members.values()] if isinstance(teacher, SeveralTeachers) else [teacher]
    return any(isinstance(table, ServerTeacher) and table.model is not None for table in tables)


def _at(table: Any, key: str) -> Any:
    for part in key.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    return table
