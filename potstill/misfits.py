"""What does not fit together in a run: text that nobody writes, needs that nothing meets. Pure, one sentence a misfit.

Each rule names the setting and what would work. What a teacher really offers is not known here: see check_teacher in
planner.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from potstill.algebra.judges import Discriminator
from potstill.algebra.objective import ESTIMATES, Objective, Term, Tier
from potstill.config import JsonlData, ReasoningGymData, RunConfig
from potstill.config_teachers import (
    EndpointTeacher,
    LocalTeacher,
    OpenAITeacher,
    SelfTeacher,
    ServerTeacher,
    SeveralTeachers,
    TeacherConfig,
    VllmTeacher,
)
from potstill.methods import PRESETS
from potstill.privilege import PRIVILEGES, shown
from potstill.wire import MAX_TOP_K
from potstill.worked import SOLVERS


def misfits(config: RunConfig) -> Iterator[str]:
    """Every reason why this run cannot be what its config says."""
    yield from _unfit_text(config)
    yield from _unfit_revision(config)
    yield from _unfit_adaptive(config)
    yield from _unfit_reading(config)
    yield from _unfit_rewards(config)
    yield from _unfit_weights(config)
    yield from _unfit_privacy(config)
    yield from _unfit_served(config)
    yield from _unfit_resources(config)


def _unfit_text(config: RunConfig) -> Iterator[str]:
    """Text that the objective reads and nobody writes, or that somebody writes and nothing reads."""
    objective, rollout, teacher = config.objective, config.rollout, config.teacher
    written = _origins(config)
    if "teacher" in {rollout.source, rollout.beside} and not _writes(teacher):
        yield (
            'text of the teacher needs one that writes: kind = "server" with teacher.model, "local", "self" or "openai"'
        )
    if rollout.source == "handoff" and (isinstance(teacher, OpenAITeacher) or not _writes(teacher)):
        yield (
            'rollout.source = "handoff" needs a teacher that goes on where another stopped: kind = "server" with '
            'teacher.model, "local" or "self"'
        )
    for name, term in objective.terms.items():
        if term.over not in {"all", *written}:
            yield _unread(config.method, name, term.over)
    if objective.compares_with_others and not {"student", "others"} <= written:
        yield f"method {config.method!r} pairs the student's answers with others: set rollout.beside"
    if objective.compares_with_others and (rollout.beside_share < 1 or rollout.beside_instead):
        yield (
            f"method {config.method!r} pairs the student's answers with others at every prompt: "
            "rollout.beside_share = 1 and beside_instead = false"
        )
    if isinstance(objective.judge, Discriminator) and rollout.view == "privileged":
        yield 'judge "discriminator" reads answers under the student\'s own prompt: rollout.view = "own"'
    if "student" in written and not objective.reads_student:
        yield (
            f'method {config.method!r} on the student\'s own text teaches nothing: rollout.source = "teacher" or '
            '"reference"'
        )
    if rollout.privileged_share and (rollout.source != "reference" or not isinstance(teacher, SelfTeacher)):
        yield 'rollout.privileged_share needs source = "reference" and a [teacher] of kind "self"'
    if rollout.snapshot is not None and rollout.source != "snapshot":
        yield 'rollout.snapshot is who writes where rollout.source = "snapshot"'
    if rollout.source == "snapshot" and rollout.view == "privileged":
        yield 'a snapshot reads the student\'s own prompt: rollout.view = "own", or source = "student"'
    if rollout.beside == rollout.source:
        yield f'rollout.beside = "{rollout.beside}" is the text of rollout.source once more: beside = "none"'
    if rollout.source == "student" and rollout.sampling.temperature == 0:
        yield "rollout.sampling.temperature = 0 never explores: on-policy distillation samples, at 1.0"


def _unfit_revision(config: RunConfig) -> Iterator[str]:
    """Text with a token that nobody sampled, where one needs whoever says which, or reads how it was sampled."""
    objective, teacher = config.objective, config.teacher
    if config.rollout.source != "revision":
        return
    read = objective.reads_teacher and isinstance(teacher, ServerTeacher | VllmTeacher | SeveralTeachers)
    if not read or any(member.tokenizer is not None for _, member in _members(teacher)):
        yield (
            'rollout.source = "revision" asks the teacher which token to replace: a method that reads its scores, and '
            'kind = "server", "vllm" or "several" with the student\'s tokenizer'
        )
    for name, term in objective.terms.items():
        if term.over != "others" and (term.needs_sampler or isinstance(term.loss, ESTIMATES)):
            yield (
                f'rollout.source = "revision" has tokens that nobody sampled, and method {config.method!r}, term '
                f"{name!r}, counts on the student's own draws: take a divergence over a support, as dac_kl_scrg does"
            )


def _unfit_adaptive(config: RunConfig) -> Iterator[str]:
    """A schedule of whose text a step learns, where something else decides it or cannot bear it."""
    rollout, adaptive, data = config.rollout, config.rollout.adaptive, config.data
    if adaptive is None:
        return
    if (rollout.source, rollout.beside, rollout.view) != ("student", "none", "own"):
        yield 'rollout.adaptive decides whose text is learnt: rollout.source = "student", beside = "none", view = "own"'
    served = config.objective.tier < Tier.FULL and not isinstance(config.teacher, SelfTeacher | LocalTeacher)
    for name, term in config.objective.terms.items():
        if not _bears_any_text(term, served=served):
            yield (
                f"rollout.adaptive has steps on text that the student did not sample: term {name!r} must be over "
                '"all", and read no reward, no log-probs of the sampler and of a served teacher no "student_topk"'
            )
    if adaptive.capacity < rollout.prompts_per_step:
        yield f"rollout.adaptive.capacity = {adaptive.capacity}, but a step has {rollout.prompts_per_step} prompts"
    if isinstance(data, ReasoningGymData) and data.dataset not in SOLVERS:
        yield f"rollout.adaptive has steps on the data's solutions, and data.dataset {data.dataset!r} comes without"
    if isinstance(data, JsonlData) and data.holdout < adaptive.validate_items:
        yield f"rollout.adaptive.validate_items = {adaptive.validate_items}, but data.holdout keeps {data.holdout}"


def _bears_any_text(term: Term, *, served: bool) -> bool:
    """Whether the term can be taken of one text of a prompt, whoever wrote it."""
    chosen_by_sampler = served and term.support.kind == "student_topk"
    return term.over == "all" and not (term.needs_sampler or term.needs_reward or chosen_by_sampler)


def _origins(config: RunConfig) -> set[str]:
    """Of the completions that the run will train on: see Term.over."""
    rollout = config.rollout
    if rollout.source not in {"student", "snapshot", "revision"}:
        return {"others"}
    own = {"student", "privileged"} if rollout.view == "privileged" else {"student"}
    return own if rollout.beside == "none" and rollout.adaptive is None else {*own, "others"}


def _writes(teacher: TeacherConfig) -> bool:
    if isinstance(teacher, ServerTeacher):
        return teacher.model is not None
    return isinstance(teacher, SelfTeacher | LocalTeacher | OpenAITeacher)


def _ranks(teacher: TeacherConfig) -> bool:
    return isinstance(teacher, OpenAITeacher) and teacher.ranks != "no"


def _members(teacher: TeacherConfig) -> list[tuple[str, EndpointTeacher | ServerTeacher]]:
    """Those that are called and score, and where they stand in the config."""
    if isinstance(teacher, SeveralTeachers):
        return [(f"teacher.members.{name}.teacher", member.teacher) for name, member in teacher.members.items()]
    return [("teacher", teacher)] if isinstance(teacher, EndpointTeacher | ServerTeacher) else []


def _unread(method: str, term: str, over: str) -> str:
    which = f"method {method!r}" if term == "main" else f"method {method!r}, its term {term!r},"
    return {
        "student": f'{which} is for text of the student: rollout.source = "student"; for other text use method "sft"',
        "privileged": f'{which} is for text written under the teacher\'s prompt: rollout.view = "privileged"',
        "others": f'{which} is for text of the teacher or the data: rollout.source or rollout.beside = "teacher" or '
        '"reference"',
    }[over]


def _unfit_reading(config: RunConfig) -> Iterator[str]:
    """A teacher's own prompt that is missing, or that shows what is not there."""
    template: str | None = getattr(config.teacher, "privileged_template", None)
    if template is None and (PRESETS[config.method].context == "privileged" or config.rollout.view == "privileged"):
        yield f"method {config.method!r} has a teacher that reads more than the student: teacher.privileged_template"
    shows = shown(template or "")
    if "advice" in shows and not isinstance(config.teacher, SelfTeacher):
        yield 'teacher.privileged_template shows {advice}, which only a teacher of kind "self" has: teacher.advisor'
    if getattr(config.teacher, "fade_steps", None) is not None and not shows:
        yield f"teacher.fade_steps: teacher.privileged_template shows nothing that fades, none of {PRIVILEGES}"


def _unfit_rewards(config: RunConfig) -> Iterator[str]:
    """Rewards that are read and not given, or given and not read."""
    objective, ranks = config.objective, _ranks(config.teacher)
    if objective.reads_verdict and _unverified(config) and not ranks:
        yield f'method {config.method!r} needs a reward: data.verifier must not be "none", or teacher.ranks'
    nears = {getattr(term.loss, "near", "teacher") for term in objective.terms.values()}
    if "own_prompt" in nears and config.rollout.view != "privileged":
        yield 'loss.near = "own_prompt" is of text written under the teacher\'s prompt: rollout.view = "privileged"'
    if ranks and not objective.reads_verdict:
        yield f"teacher.ranks rewards completions, and method {config.method!r} reads no reward"
    if isinstance(objective.judge, Discriminator) and config.learner.ranks > 1:
        yield 'judge "discriminator" learns in one process: learner.ranks = 1'
    if isinstance(objective.judge, Discriminator) and config.learner.recompute:
        yield 'judge "discriminator" lends its weights to the student\'s layers for one pass: learner.recompute = false'
    if config.rollout.samples_per_prompt >= 2:
        return
    if ranks:
        yield "teacher.ranks puts completions of one prompt in order: rollout.samples_per_prompt = 4 or more"
    if objective.reads_reward:
        yield f"method {config.method!r} compares completions of one prompt: rollout.samples_per_prompt = 4 or more"


def _unfit_privacy(config: RunConfig) -> Iterator[str]:
    """Data that cannot say which of its text is private."""
    if config.objective.reads_privacy and not isinstance(config.data, JsonlData):
        yield f'method {config.method!r} reads which text is private, as `private` of a line: data.kind = "jsonl"'


def _unfit_weights(config: RunConfig) -> Iterator[str]:
    """Teachers whose weights shall be learned, where there is nothing to learn them from or nothing to weigh."""
    teacher = config.teacher
    if not isinstance(teacher, LocalTeacher) or teacher.learn_weights is None:
        return
    if len(teacher.models) < 2:
        yield "teacher.learn_weights weighs several models: name two or more in teacher.models"
    if any(model.domains for model in teacher.models):
        yield "teacher.learn_weights weighs models that score the same text: none of teacher.models has domains"
    if not config.objective.reads_teacher:
        yield f"teacher.learn_weights weighs what models say, and method {config.method!r} reads no teacher"
    if _unverified(config) and not config.rollout.references_alone:
        yield (
            'teacher.learn_weights needs text that is known to be right: data.verifier must not be "none", or '
            'rollout.source or rollout.beside = "reference", without text of the teacher'
        )


def _unverified(config: RunConfig) -> bool:
    return isinstance(config.data, JsonlData) and config.data.verifier == "none"


def _unfit_served(config: RunConfig) -> Iterator[str]:
    """What a teacher that is called cannot give."""
    objective, teacher = config.objective, config.teacher
    if isinstance(teacher, SelfTeacher | LocalTeacher):
        return
    if isinstance(teacher, ServerTeacher) and teacher.follows == "student" and config.loop.max_staleness > 0:
        yield 'teacher.follows = "student" needs steps one after the other: loop.max_staleness = 0'
    if objective.tier < Tier.FULL:
        yield from _unfit_widths(objective)
    for place, member in _members(teacher):
        if member.tokenizer is not None and not objective.crosses_tokenizers:
            yield (
                f"{place}.tokenizer names other tokens than the student's, and method {config.method!r} compares token "
                "by token: use cross_tokenizer, alm or cross_tokenizer_hybrid"
            )


def _unfit_resources(config: RunConfig) -> Iterator[str]:
    """Room that is asked for and would stay empty, or that is too small for what shares it."""
    gpus, together = config.resources.rollout.gpus, config.rollout.vllm.tensor_parallel
    if config.rollout.engine == "transformers":
        if gpus:
            yield 'rollout.engine = "transformers" writes on CPUs: engine = "vllm", or resources.rollout.gpus = 0'
        if together > 1:
            yield f'rollout.vllm.tensor_parallel = {together} is for rollout.engine = "vllm"'
    elif together > 1 and gpus not in {0, together}:
        yield f"rollout.vllm.tensor_parallel = {together} wants as many GPUs: resources.rollout.gpus = {together}"
    elif 0 < gpus < 1 and config.rollout.vllm.cache_gb is None:
        yield f"resources.rollout.gpus = {gpus:g} shares a GPU: rollout.vllm.cache_gb says how much of it a cache has"
    if together > 1 and config.weights.transport == "device":
        yield 'weights.transport = "device" reaches one process of a worker: "auto" with rollout.vllm.tensor_parallel'


def _unfit_widths(objective: Objective) -> Iterator[str]:
    """Of what a server is asked for once a position, for all terms."""
    if objective.num_draws > MAX_TOP_K:
        yield f"objective.support.m is {objective.num_draws}: a teacher server scores at most {MAX_TOP_K} ids"
    for kind in ("student_topk", "teacher_topk"):
        supports = [term.support for term in objective.terms.values() if term.support.kind == kind]
        widths = sorted({getattr(support, "k", 0) for support in supports})
        if len(widths) > 1:
            yield f'terms over "{kind}" want k = {widths}: give them the same, a server is asked once'
        if widths and widths[-1] > MAX_TOP_K:
            yield f"objective.support.k is {widths[-1]}: a teacher server sends at most {MAX_TOP_K}"
