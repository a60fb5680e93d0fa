"""Who says what a completion is worth, for terms and gates that read a reward. Choices only; learner/judge.py asks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potstill.section import Positive, Section


class Verifier(Section):
    """Whoever judged the rollouts when they were written: rewards are taken as they came."""

    kind: Literal["verifier"] = "verifier"


class Discriminator(Section):
    """A model that learns, beside the student, to score the text of others above the student's (GAD, 2511.10643).

    It begins as the student with a scalar head, and takes as much memory again as training all that the student trains.
    Its first scores are chance: a reward that is a ramp lets it learn alone for some steps.
    """

    kind: Literal["discriminator"] = "discriminator"
    lr: Positive = 1e-6
    """Of its own AdamW, constant; the other numbers are those of [optim]. Too small: the student finds what it likes,
    and answers grow without end; too large: it knows the authors by heart and rewards no progress."""
    max_grad_norm: Positive = 0.2
    """Global norm at which its gradient is clipped."""


Judge = Annotated[Verifier | Discriminator, Field(discriminator="kind")]
