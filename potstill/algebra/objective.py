"""The objective: one algebra in which a method is a table of choices, not a trainer.

    L = Σ over terms  weight · Agg_t[ gates_t · correction_t · loss_t over a support ]        (DESIGN §4)

An Objective is its main term, written flat, and auxiliary terms by name. What a choice computes is in learner/; what it
needs of teacher, rewards and text is said here, so that a plan can refuse before anything is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from potstill.algebra.aggregations import Aggregation, TokenMean
from potstill.algebra.consistency import disagreements, misfits, misjudged
from potstill.algebra.corrections import Correction, Ignored
from potstill.algebra.gates import (
    AlignedOneToOne,
    AlignedSpan,
    Confidence,
    EarlyWeight,
    EntropyGap,
    Evidence,
    Gate,
    PassRate,
    TeacherEntropyAbove,
)
from potstill.algebra.judges import Discriminator, Judge, Verifier
from potstill.algebra.losses import (
    CHUNKED,
    DIVERGENCES,
    ESTIMATES,
    K2,
    ChunkCredit,
    Entropy,
    Likelihood,
    Loss,
    PlackettLuce,
    PolicyGradient,
    Preference,
    RatioK3,
    SortedL1,
)
from potstill.algebra.supports import Full, RandomSampling, Sampled, Samples, Support
from potstill.algebra.targets import Swing, Taid, Target, Tempered
from potstill.section import Ramp, Section


class Tier(IntEnum):
    """What a teacher can be asked for. Each tier can do what the ones below it can."""

    TEXT = 0  # writes text only
    SAMPLED = 1  # log-probs of given tokens
    TOPK = 2  # its own top-k
    IDS = 3  # log-probs of ids that the caller chose
    FULL = 4  # hidden states or all logits


class Term(Section):
    """weight · Agg[ gates · correction · loss ]. A part that needs nothing more said is its kind: support = "full"."""

    weight: float | Ramp = 1.0
    """Of the term. A ramp: a schedule or, over one step, a switch."""
    over: Literal["all", "student", "privileged", "others"] = "all"
    """Completions that it reads: all; what the student wrote; the same under the teacher's own prompt; what the teacher
    or the data wrote."""
    against: Literal["teacher", "reference"] = "teacher"
    """Whom the student is compared with; reference: the student as the run found it."""
    support: Support = Sampled()
    """Outcomes at each position."""
    loss: Loss
    """What is minimised there."""
    target: Target | None = None
    """What is done to both distributions first. None: they are compared as they are, at temperature 1."""
    gates: tuple[Gate, ...] = ()
    """Factors per token; they multiply."""
    correction: Correction = Ignored()
    """For the policy that wrote the text."""
    aggregation: Aggregation = TokenMean()
    """How tokens are added up."""

    @model_validator(mode="before")
    @classmethod
    def _kinds(cls, raw: Any) -> Any:
        return _spelt_out(raw) if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _fits(self) -> Term:
        for problem in misfits(self):
            raise ValueError(problem)
        return self

    @property
    def reads_distribution(self) -> bool:
        """Whether it compares distributions, and not only log-probs of written tokens."""
        return isinstance(self.loss, DIVERGENCES)

    @property
    def needs_tier(self) -> Tier:
        """The least that whoever it is against must offer."""
        return max(_support_tier(self), *(_gate_tier(gate) for gate in self.gates), Tier.TEXT)

    @property
    def sees_all_mass(self) -> bool:
        """Whether both sides are their whole distributions, at most with the rest as one outcome: KL means KL."""
        whole = isinstance(self.support, Full) or getattr(self.support, "rest", "") == "tail"
        return whole and self.target is None

    @property
    def vanishes_at_teacher(self) -> bool:
        """Whether its loss and gradient are 0 where the student is the teacher, whatever its gates and weights."""
        if isinstance(self.loss, PolicyGradient):
            loss = self.loss
            return loss.reward == 0 and loss.extrapolation == 1 and loss.student == "current"
        rest = getattr(self.support, "rest", "")
        compared = isinstance(self.loss, DIVERGENCES) and not isinstance(self.loss, PlackettLuce | SortedL1)
        exact = rest != "partial" and not isinstance(self.support, RandomSampling)
        at_rest = compared and exact and isinstance(self.target, Tempered | None)
        return self.reads_scores and (isinstance(self.loss, K2 | RatioK3 | ChunkCredit) or at_rest)

    @property
    def reads_scores(self) -> bool:
        """Whether it reads what a teacher says of the tokens."""
        return self.against == "teacher" and self.needs_tier > Tier.TEXT

    @property
    def rewarded(self) -> bool:
        """Whether its loss reads what a completion earned beside the others of its prompt."""
        ranked = isinstance(self.loss, Preference) and self.loss.pairs == "best_over_worst"
        return ranked or (isinstance(self.loss, PolicyGradient) and self.loss.reward != 0)

    @property
    def reads_chunks(self) -> bool:
        """Whether tokens may have been scored together, by a teacher of another tokenizer (TeacherScores.chunks)."""
        return isinstance(self.loss, CHUNKED) or any(isinstance(gate, AlignedOneToOne) for gate in self.gates)

    @property
    def needs_reward(self) -> bool:
        return self.rewarded or any(isinstance(gate, PassRate | Evidence) for gate in self.gates)

    @property
    def needs_reference(self) -> bool:
        """Whether it reads log-probs of the student as the run found it."""
        extrapolates = isinstance(self.loss, PolicyGradient) and self.loss.extrapolation != 1
        return self.against == "reference" or extrapolates or isinstance(self.loss, Preference)

    @property
    def needs_sampler(self) -> bool:
        """Whether it reads the log-probs with which the text was sampled."""
        reads = isinstance(self.loss, PolicyGradient) and self.loss.student == "sampler"
        return reads or isinstance(self.loss, RatioK3) or not isinstance(self.correction, Ignored)

    @property
    def needs_privacy(self) -> bool:
        """Whether it reads how private each token is."""
        return isinstance(self.target, Swing)


class Objective(Term):
    """The main term, and auxiliary terms beside it."""

    auxiliaries: dict[str, Term] = Field(default_factory=dict)
    """By name. They share the forward pass."""
    judge: Judge = Verifier()
    """Whose rewards they read."""

    @model_validator(mode="after")
    def _agrees(self) -> Objective:
        for problem in (*disagreements(list(self.terms.values())), *misjudged(self)):
            raise ValueError(problem)
        return self

    @property
    def terms(self) -> Mapping[str, Term]:
        """All of them; the main one is called "main"."""
        return {"main": self, **self.auxiliaries}

    @property
    def tier(self) -> Tier:
        """The least that a teacher must offer."""
        return max((term.needs_tier for term in self.terms.values() if term.reads_scores), default=Tier.TEXT)

    @property
    def reads_teacher(self) -> bool:
        return self.tier > Tier.TEXT

    @property
    def num_draws(self) -> int:
        """Draws of the student that are kept at every position while it writes, beside the written token."""
        return max((term.support.m for term in self.terms.values() if isinstance(term.support, Samples)), default=0)

    def chosen(self) -> dict[str, Any]:
        """The choices that are not defaults, as a config would write them; each part with its kind."""
        return _chosen(self)

    def scored(self, origin: str) -> list[Term]:
        """The terms that read a teacher's scores of text of this origin (potstill/types.py, Rollout.origin)."""
        return [term for term in self.terms.values() if term.reads_scores and term.over in {"all", origin}]

    @property
    def crosses_tokenizers(self) -> bool:
        """Whether the teacher may have another tokenizer than the student."""
        return all(term.reads_chunks for term in self.terms.values() if term.reads_scores)

    @property
    def reads_reward(self) -> bool:
        return any(term.needs_reward for term in self.terms.values())

    @property
    def reads_verdict(self) -> bool:
        """Whether rollouts must come with a reward."""
        return self.reads_reward and isinstance(self.judge, Verifier)

    @property
    def reads_reference(self) -> bool:
        return any(term.needs_reference for term in self.terms.values())

    @property
    def reads_privacy(self) -> bool:
        return any(term.needs_privacy for term in self.terms.values())

    @property
    def reads_others(self) -> bool:
        """Whether a term is for text that the student did not write, or compares it with the student's."""
        return self.compares_with_others or any(term.over == "others" for term in self.terms.values())

    @property
    def compares_with_others(self) -> bool:
        """Whether every prompt needs text of both the student and others."""
        losses = [term.loss for term in self.terms.values() if isinstance(term.loss, Preference)]
        return isinstance(self.judge, Discriminator) or any(loss.pairs == "others_over_student" for loss in losses)

    @property
    def reads_student(self) -> bool:
        """Whether the student's own text is learnt, or judged for what it says of its prompt."""
        judged = any(isinstance(gate, PassRate) for term in self.terms.values() for gate in term.gates)
        return judged or any(term.over != "others" for term in self.terms.values())

    @property
    def compares_completions(self) -> bool:
        """Whether a term's loss is of two completions of one prompt."""
        return any(isinstance(term.loss, Preference) for term in self.terms.values())

    @property
    def carries_state(self) -> bool:
        """Whether a checkpoint must keep more than weights and optimizer to continue it."""
        moved = any(isinstance(term.target, Taid) for term in self.terms.values())
        return moved or isinstance(self.judge, Discriminator)


def lay_over(preset: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's table with a user's changes. A part whose kind changes is replaced whole, not merged."""
    merged = dict(preset)
    for key, change in _spelt_out(changes).items():
        old = merged.get(key)
        same_kind = isinstance(old, Mapping) and isinstance(change, Mapping)
        if same_kind and change.get("kind", old.get("kind")) == old.get("kind"):  # type: ignore[union-attr]
            merged[key] = lay_over(old, change)  # type: ignore[arg-type]
        else:
            merged[key] = change
    return merged


def _chosen(table: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        if name == "kind" or value != field.get_default(call_default_factory=True):
            found[name] = _plain(value)
    return dict(sorted(found.items(), key=lambda item: item[0] != "kind"))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        table = _chosen(value)
        return table["kind"] if table.keys() == {"kind"} else table
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _spelt_out(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Parts given by their kind alone, as tables."""

    def table(value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    spelt = {key: table(value) if key in _PARTS else value for key, value in raw.items()}
    if isinstance(spelt.get("gates"), list | tuple):
        spelt["gates"] = [table(gate) for gate in spelt["gates"]]
    return spelt


_PARTS = frozenset({"support", "loss", "target", "correction", "aggregation", "judge"})


def _support_tier(term: Term) -> Tier:
    loss = term.loss
    if isinstance(loss, Likelihood | Entropy | Preference):
        return Tier.TEXT
    if isinstance(loss, PolicyGradient) and loss.distil == 0:
        return Tier.SAMPLED if loss.kl_penalty and loss.near == "teacher" else Tier.TEXT
    if isinstance(loss, PolicyGradient) and loss.baseline == "kl":
        return Tier.FULL
    tiers = {"sampled": Tier.SAMPLED, "teacher_topk": Tier.TOPK, "student_topk": Tier.IDS, "samples": Tier.IDS}
    return tiers.get(term.support.kind, Tier.FULL)


def _gate_tier(gate: Gate) -> Tier:
    """potstill's own server sends the teacher's entropy beside the log-prob of the written token."""
    if isinstance(gate, TeacherEntropyAbove | EntropyGap | EarlyWeight | Evidence):
        return Tier.SAMPLED
    return Tier.TOPK if isinstance(gate, Confidence | AlignedOneToOne | AlignedSpan) else Tier.TEXT


__all__ = ["DIVERGENCES", "ESTIMATES", "Objective", "Term", "Tier", "lay_over"]
