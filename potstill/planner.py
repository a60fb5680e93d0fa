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

from potstill.algebra.objective import ESTIMATES, Objective, Tier
from potstill.config import JsonlData, LocalTeacher, RunConfig, SelfTeacher, ServerTeacher
from potstill.errors import ConfigError, PlanError
from potstill.methods import PRESETS
from potstill.wire import MAX_TOP_K

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
    if isinstance(config.teacher, SelfTeacher | LocalTeacher):
        return Tier.FULL
    return SERVER_TIER if isinstance(config.teacher, ServerTeacher) else Tier.TEXT


def _refuse_unfit(config: RunConfig, found: Tier) -> None:
    method, objective = PRESETS[config.method], config.objective
    if objective.tier > found:
        raise PlanError(
            f"method {config.method!r} needs a teacher of tier {objective.tier.name}, this one offers {found.name}; "
            f"nearest that it can serve: {', '.join(nearest(config.method, found))}"
        )
    if method.missing:
        raise PlanError(
            f"method {config.method!r} needs {' and '.join(method.missing)}, which a run cannot bring yet; "
            f"nearest that it can: {', '.join(nearest(config.method, found))}"
        )
    for problem in (*_unfit_text(config), *_unfit_needs(config)):
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
            method.needs.keys() == wanted.needs.keys(),
        )
        return -sum(same), -method.objective.tier

    able = [other for other, method in PRESETS.items() if method.objective.tier <= found and not method.missing]
    return sorted((other for other in able if other != name), key=unlike)[:3]


def _unfit_text(config: RunConfig) -> Iterator[str]:
    """Text that the objective reads and nobody writes, or that somebody writes and nothing reads."""
    objective, rollout, teacher = config.objective, config.rollout, config.teacher
    written = _origins(config)
    served = isinstance(teacher, SelfTeacher | LocalTeacher) or getattr(teacher, "model", None) is not None
    if "teacher" in {rollout.source, rollout.beside} and not served:
        yield 'text of the teacher needs teacher.model, a folder that a rollout worker can load, or kind = "self"'
    for name, term in objective.terms.items():
        if term.over not in {"all", *written}:
            yield _unread(config.method, name, term.over)
    if objective.compares_completions and not {"student", "others"} <= written:
        yield f"method {config.method!r} pairs the student's answers with others: set rollout.beside"
    if "student" in written and not objective.reads_student:
        yield (
            f'method {config.method!r} on the student\'s own text teaches nothing: rollout.source = "teacher" or '
            '"reference"'
        )
    if rollout.privileged_share and (rollout.source != "reference" or not isinstance(teacher, SelfTeacher)):
        yield 'rollout.privileged_share needs source = "reference" and a [teacher] of kind "self"'
    if rollout.source == "student" and rollout.sampling.temperature == 0:
        yield "rollout.sampling.temperature = 0 never explores: on-policy distillation samples, at 1.0"


def _origins(config: RunConfig) -> set[str]:
    """Of the completions that the run will train on: see Term.over."""
    rollout = config.rollout
    if rollout.source != "student":
        return {"others"}
    own = {"student", "privileged"} if rollout.view == "privileged" else {"student"}
    return own if rollout.beside == "none" else {*own, "others"}


def _unread(method: str, term: str, over: str) -> str:
    which = f"method {method!r}" if term == "main" else f"method {method!r}, its term {term!r},"
    return {
        "student": f'{which} is for text of the student: rollout.source = "student"; for other text use method "sft"',
        "privileged": f'{which} is for text written under the teacher\'s prompt: rollout.view = "privileged"',
        "others": f'{which} is for text of the teacher or the data: rollout.source or rollout.beside = "teacher" or '
        '"reference"',
    }[over]


def _unfit_needs(config: RunConfig) -> Iterator[str]:
    objective, teacher = config.objective, config.teacher
    templated = getattr(teacher, "privileged_template", None) is not None
    if (PRESETS[config.method].context == "privileged" or config.rollout.view == "privileged") and not templated:
        yield f"method {config.method!r} has a teacher that reads more than the student: teacher.privileged_template"
    if objective.reads_reward and isinstance(config.data, JsonlData) and config.data.verifier == "none":
        yield f'method {config.method!r} needs a reward: data.verifier must not be "none"'
    if objective.reads_reward and config.rollout.samples_per_prompt < 2:
        yield f"method {config.method!r} compares completions of one prompt: rollout.samples_per_prompt = 4 or more"
    if isinstance(teacher, ServerTeacher):
        yield from _unfit_widths(objective)


def _unfit_widths(objective: Objective) -> Iterator[str]:
    """Of what a server is asked for once a position, for all terms."""
    for kind in ("student_topk", "teacher_topk"):
        supports = [term.support for term in objective.terms.values() if term.support.kind == kind]
        widths = sorted({getattr(support, "k", 0) for support in supports})
        if len(widths) > 1:
            yield f'terms over "{kind}" want k = {widths}: give them the same, a server is asked once'
        if widths and widths[-1] > MAX_TOP_K:
            yield f"objective.support.k is {widths[-1]}: a teacher server sends at most {MAX_TOP_K}"


def _notes(config: RunConfig) -> list[str]:
    notes = []
    sampling = config.rollout.sampling
    if config.rollout.source == "student" and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.temperature != 1):
        notes.append("rollouts are not drawn from the student at temperature 1: states differ, the loss is still of q")
    if isinstance(config.objective.loss, ESTIMATES):
        notes.append("sampled-token gradients are noisy: use a smaller learning rate than for a top-k method")
    if config.eval.items == 0:
        notes.append("eval.items = 0: no held-out accuracy will be measured")
    resolved = config.model_dump()
    for key, wanted in PRESETS[config.method].settings.items():
        if (found := _at(resolved, key)) != wanted:
            notes.append(f"the paper of {config.method!r} has {key} = {wanted!r}, this run {found!r}")
    return notes


def _at(table: Any, key: str) -> Any:
    for part in key.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    return table
