"""What a teacher that scores can really be used for: `potstill teacher probe`, and in short before every run.

Capabilities are claims; a probe asks tiny questions and looks at the numbers. A rung that the teacher refuses lowers
its tier; nonsense, or a number beyond findings.py, refuses the teacher. It raises nothing of the teacher's: one that is
away, refuses or answers nonsense is a finding.

It cannot see tempering: no answer tells a tempered distribution from a sharper one. Whoever asks sends no temperature
but 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from potstill.algebra.objective import Tier
from potstill.calling.guard import Guard
from potstill.errors import AlignmentError, TeacherError, TeacherRefused, TokenizerMismatch
from potstill.probing.findings import refusals
from potstill.probing.interview import LEAST_CONTEXT, Interview, Unscored
from potstill.teachers.foreign import highest
from potstill.teachers.opening import TEACHER, Access, ScoringTeacher, open_scorer
from potstill.teachers.scorer import Scorer
from potstill.tokenization import load_tokenizer
from potstill.types import TeacherIdentity
from potstill.wire import Capabilities

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_TRIED = 8192
"""Tokens of a text that is sent only to see whether it is read. A longer one costs more than it tells."""
_NUM_TOGETHER = 8  # items of the request that throughput is taken from
_TEACHERS = (TeacherError, TokenizerMismatch, AlignmentError)  # what is the teacher's doing


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Findings; None, or left out of `measured`, where the teacher did not get that far."""

    problems: tuple[str, ...] = ()
    """Why nobody should learn from it. Without any it can be used, as far as its tier goes."""
    notes: tuple[str, ...] = ()
    """Claims that do not hold, and what was not tried."""
    able: Capabilities | None = None  # what it claims; None: it could not be reached
    tier: Tier | None = None  # the highest up to which every rung works
    measured: dict[str, float] = field(default_factory=dict)  # by the names of findings.py
    max_top_k: int | None = None  # that came back
    context_length: int | None = None  # tokens of a text that was scored
    latency_ms: float | None = None
    tokens_per_s: float | None = None

    @property
    def identity(self) -> TeacherIdentity | None:
        return None if self.able is None else self.able.identity

    @property
    def headline(self) -> str:
        """One line, its notes at the end."""
        said = "unreachable" if self.able is None or self.tier is None else f"{self.able.model} gives {self.tier.name}"
        return "; ".join((said, *self.notes, *self.problems))

    def as_event(self) -> dict[str, Any]:
        """What a run keeps of it: who answered, how far, how well and how fast."""
        identity = None if self.identity is None else asdict(self.identity)
        tier = None if self.tier is None else self.tier.name
        return {"identity": identity, "tier": tier, "latency_ms": self.latency_ms, **self.measured}

    def as_dict(self) -> dict[str, Any]:
        """Plain values. Claims stand beside what was found, under `claims`."""
        return {
            "problems": list(self.problems),
            "notes": list(self.notes),
            "claims": None if self.able is None else self.able.model_dump(mode="json"),
            "tier": None if self.tier is None else self.tier.name,
            "measured": dict(self.measured),
            "max_top_k": self.max_top_k,
            "context_length": self.context_length,
            "latency_ms": self.latency_ms,
            "tokens_per_s": self.tokens_per_s,
        }


def open_alone(
    teacher: ScoringTeacher, access: Access, *, student: PreTrainedTokenizerBase, guard: Guard | None = None
) -> tuple[Scorer, PreTrainedTokenizerBase]:
    """One teacher in its own tokens, without what keeps its answers, and its tokenizer: by itself, as it is probed."""
    own = student if teacher.tokenizer is None else load_tokenizer(teacher.tokenizer)
    plain = teacher.model_copy(update={"tokenizer": None, "cache_mib": None})
    return open_scorer(plain, {TEACHER: access}, student=own, guard=guard), own


async def probe(scorer: Scorer, tokenizer: PreTrainedTokenizerBase | None = None) -> ProbeReport:
    """All that some thirty tiny requests find, and one of the longest text that the teacher claims to read.

    With the teacher's own `tokenizer` it is asked about a text, which is all that some endpoints take.
    """
    report = await preflight(scorer, tokenizer)
    able = report.able
    if able is None or report.problems:
        return report
    interview = Interview(scorer, able, tokenizer)
    try:
        report = await _with_top_k(interview, report, able)
        report = await _with_context(interview, report, min(able.context_length, able.max_tokens))
        return replace(report, tokens_per_s=await interview.tokens_per_s(_NUM_TOGETHER))
    except _TEACHERS as error:
        return replace(report, problems=(str(error),))


async def preflight(
    scorer: Scorer, tokenizer: PreTrainedTokenizerBase | None = None, *, needed: Tier = Tier.FULL
) -> ProbeReport:
    """The same without limits and throughput, and no rung above the `needed` one: some fifteen tiny requests."""
    try:
        able = await scorer.capabilities()
    except _TEACHERS as error:
        return ProbeReport(problems=(str(error),))
    report = ProbeReport(able=able, tier=Tier.TEXT)
    if able.tier == Tier.TEXT:
        return replace(report, problems=(f"{able.model} scores no text that it is given",))
    if able.context_length < LEAST_CONTEXT or able.vocabulary < 2:
        problem = f"{able.model} reads {able.context_length} tokens of {able.vocabulary}: too few to ask it anything"
        return replace(report, problems=(problem,))
    interview = Interview(scorer, able, tokenizer)
    try:
        report = await _with_tier(interview, report, able, needed)
        return report if report.problems else await _with_measures(interview, report)
    except _TEACHERS as error:
        return replace(report, problems=(str(error),))


async def _with_tier(interview: Interview, report: ProbeReport, able: Capabilities, needed: Tier) -> ProbeReport:
    """The highest tier whose rungs, and all below, are given. States are offered by their width, whatever the tier."""
    offered = [tier for tier in (Tier.SAMPLED, Tier.TOPK, Tier.IDS) if tier <= able.tier]
    offered += [Tier.FULL] if able.hidden_size else []
    for tier in offered:
        if tier > needed:
            break
        try:
            await interview.rung(tier)
        except TeacherRefused as error:
            why = f"it claims {tier.name} and does not give it: {error}"
            return replace(report, problems=(why,)) if tier == offered[0] else replace(report, notes=(why,))
        report = replace(report, tier=tier)
    return report


async def _with_measures(interview: Interview, report: ProbeReport) -> ProbeReport:
    """What its numbers say, against findings.py."""
    tier = report.tier or Tier.TEXT
    first, latency_ms = await interview.first()
    noise = await interview.noise(first)
    found = {"noise": noise, "blankness": await interview.blankness(first, tier)}
    notes = list(report.notes)
    if tier >= Tier.TOPK:
        found["mass_error"] = await interview.mass_error()
    # an endpoint that takes text alone cannot be asked of tokens in an order that no text reads as
    try:
        found["batch_gap"] = await interview.batch_gap(first)
        found["context_effect"] = await interview.context_effect(first) - noise
        if tier >= Tier.TOPK:
            found["greedy_gap"] = await interview.greedy_gap()
    except Unscored as error:
        notes.append(f"not all was tried: {error}")
    problems = tuple(refusals(found))
    return replace(report, problems=problems, notes=tuple(notes), measured=found, latency_ms=latency_ms)


async def _with_top_k(interview: Interview, report: ProbeReport, able: Capabilities) -> ProbeReport:
    if report.tier is None or report.tier < Tier.TOPK:
        return report
    found = await highest(interview.gives_top_k, able.max_top_k)
    claim = f"it claims a top-k of {able.max_top_k} and gives {found}"
    notes = report.notes if found == able.max_top_k else (*report.notes, claim)
    return replace(report, max_top_k=found, notes=notes)


async def _with_context(interview: Interview, report: ProbeReport, claimed: int) -> ProbeReport:
    if claimed > LONGEST_TRIED:
        note = f"its context of {claimed} tokens was not tried: {LONGEST_TRIED} are the most that a probe sends"
        return replace(report, notes=(*report.notes, note))
    try:
        await interview.reads(claimed)
    except Unscored as error:
        return replace(report, notes=(*report.notes, f"its context of {claimed} tokens was not tried: {error}"))
    except TeacherRefused as error:
        return replace(report, problems=(f"it claims to read {claimed} tokens and does not: {error}",))
    return replace(report, context_length=claimed)
