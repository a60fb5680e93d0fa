"""Factors per token, without gradient: what a token, a completion or a prompt counts for.

Choices only; learner/gates.py computes them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potstill.section import Count, NotNegative, Positive, Section, Unit


class TeacherEntropyAbove(Section):
    """1 where the teacher's entropy exceeds a threshold, else 0 (EOPD, 2603.07079)."""

    kind: Literal["teacher_entropy_above"] = "teacher_entropy_above"
    nats: float = 0.8
    """The threshold."""


class EntropyGap(Section):
    """σ((H_student − H_teacher) / scale): more where the teacher is surer (TSD-KD, 2603.13260)."""

    kind: Literal["entropy_gap"] = "entropy_gap"
    scale: Positive = 1.0
    """Nats over which the gate opens."""


class StudentEntropyTop(Section):
    """1 for the share of each sequence's tokens at which the student is least sure, else 0 (TSD-KD)."""

    kind: Literal["student_entropy_top"] = "student_entropy_top"
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the sequence's tokens, rounded up."""


class Opener(Section):
    """1 for the beginning of each sequence that holds this share of the student's entropy, else 0 (TSD-KD)."""

    kind: Literal["opener"] = "opener"
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the sequence's summed entropy."""


class EarlyWeight(Section):
    """1 + γ (1 − Σ_{≤t} |A| / Σ |A|): early tokens count more (IW-OPD, 2606.22600). In [1, 1 + γ], falling."""

    kind: Literal["early_weight"] = "early_weight"
    gamma: NotNegative = 0.5
    """0: all the same."""


class Window(Section):
    """1 for tokens of the completion from `first` on and before `last`, else 0 (SDFT; early-stopped rollouts)."""

    kind: Literal["window"] = "window"
    first: Annotated[int, Field(ge=0)] = 0
    """Tokens skipped: those that parrot the privileged prompt."""
    last: Count | None = None
    """None: to the end."""


class Confidence(Section):
    """The teacher's highest probability at the token."""

    kind: Literal["confidence"] = "confidence"


class PerDomain(Section):
    """A weight for each domain of the prompts."""

    kind: Literal["per_domain"] = "per_domain"
    weights: dict[str, NotNegative]
    """Domain to weight. A domain that is not listed is an error."""


class PerTeacher(Section):
    """A weight for each teacher, by name."""

    kind: Literal["per_teacher"] = "per_teacher"
    weights: dict[str, NotNegative]
    """Teacher's name to weight. A name that is not listed is an error."""


class PassRate(Section):
    """p^a (1 − p)^b of the prompt's smoothed pass rate, scaled to mean 1 over the step (PACED, 2603.11178)."""

    kind: Literal["pass_rate"] = "pass_rate"
    a: NotNegative = 1.0
    """Large: prompts that nearly always fail count less."""
    b: NotNegative = 1.0
    """Large: prompts that nearly always succeed count less."""
    smoothing: NotNegative = 1.0
    """Successes and failures added to each count (1: Laplace). 0: prompts that always fail or succeed count nothing."""


class Evidence(Section):
    """clip((p/q)^sign(A), 1 − ε, 1 + ε): the teacher sets how much, the reward which way (RLSD, 2604.03128)."""

    kind: Literal["evidence"] = "evidence"
    clip: Unit = 0.2
    """ε. 0 would be the reward alone."""


class AlignedOneToOne(Section):
    """1 where the top-k of a teacher of another tokenizer can be read, else 0: one token there is one here."""

    kind: Literal["aligned_one_to_one"] = "aligned_one_to_one"


class AlignedSpan(Section):
    """1 where "aligned_one_to_one" is 0, and the other way round."""

    kind: Literal["aligned_span"] = "aligned_span"


Gate = Annotated[
    TeacherEntropyAbove
    | EntropyGap
    | StudentEntropyTop
    | Opener
    | EarlyWeight
    | Window
    | Confidence
    | PerDomain
    | PerTeacher
    | PassRate
    | Evidence
    | AlignedOneToOne
    | AlignedSpan,
    Field(discriminator="kind"),
]
