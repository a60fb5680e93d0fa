"""Outcomes at each position over which a loss is taken, and what becomes of the rest.

Choices only; learner/supports.py computes them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potstill.section import Count, Section, Unit

Entries = Annotated[int, Field(ge=1, le=1024)]
Rest = Literal["tail", "renorm", "partial"]


class Sampled(Section):
    """The token that was written. The least that a teacher can be asked for; a noisy gradient."""

    kind: Literal["sampled"] = "sampled"


class Samples(Section):
    """Several independent draws from the sampler at every position (AsyncOPD, 2606.24143), and not the written token,
    which is one more. Variance falls as 1/m."""

    kind: Literal["samples"] = "samples"
    m: Count
    """Draws at each position. Too few: the noise of one; too many: the teacher scores them all."""


class TopK(Section):
    """A top-k of the vocabulary."""

    k: Entries
    """Entries. Too small: what matters lies in the rest."""
    rest: Rest = "tail"
    """tail: one more outcome holds the mass outside; renorm: both sides are scaled to 1; partial: it is left out."""


class StudentTopK(TopK):
    """The student's own most probable tokens: where a reverse KL has its mass."""

    kind: Literal["student_topk"] = "student_topk"


class TeacherTopK(TopK):
    """The teacher's most probable tokens: where a forward KL has its mass."""

    kind: Literal["teacher_topk"] = "teacher_topk"


class UnionTopK(TopK):
    """The most probable tokens of either side, for divergences that look both ways."""

    kind: Literal["union_topk"] = "union_topk"


class IntersectionTopK(TopK):
    """Tokens that both sides find probable."""

    kind: Literal["intersection_topk"] = "intersection_topk"


class RandomSampling(Section):
    """Draws from the teacher with replacement, and its `head` exactly: an unbiased forward KL (2503.16870)."""

    kind: Literal["random_sampling"] = "random_sampling"
    draws: Count = 50
    """Draws at each position."""
    head: Annotated[int, Field(ge=0)] = 0
    """Most probable tokens that are kept exactly; the draws are then of the rest. 8 of 50 lowers the variance 4.7 ×."""


class Nucleus(Section):
    """The smallest set that holds this much of the teacher's mass, renormalised (a fixed DAC clip, 2407.10068)."""

    kind: Literal["nucleus"] = "nucleus"
    mass: Unit = 0.95
    """Teacher's probability kept."""


class Full(Section):
    """The whole vocabulary."""

    kind: Literal["full"] = "full"


Support = Annotated[
    Sampled | Samples | StudentTopK | TeacherTopK | UnionTopK | IntersectionTopK | RandomSampling | Nucleus | Full,
    Field(discriminator="kind"),
]
