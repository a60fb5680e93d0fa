"""What is done to the two distributions before they are compared.

Choices only; learner/tempering.py computes them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.section import NotNegative, Positive, Ramp, Section, values


class Tempered(Section):
    """Softmax of logits / T."""

    kind: Literal["tempered"] = "tempered"
    student: Positive = 1.0
    """T of the student's side."""
    teacher: Positive = 1.0
    """T of the teacher's side. Apart from the student's: a calibrated teacher (FIRST, 2408.12168)."""
    times_square: bool = False
    """Multiply the loss by the student's T², which keeps the gradient's scale (Hinton)."""


class Standardised(Section):
    """Both sides' logits less their mean, over their deviation, over T (2403.01427). Loses absolute confidence."""

    kind: Literal["standardised"] = "standardised"
    temperature: Positive = 2.0
    """T after standardising; the loss is multiplied by T²."""


class Taid(Section):
    """softmax((1 − t) z_student + t z_teacher), t rising as the loss falls (TAID, 2501.16937); t is state."""

    kind: Literal["taid"] = "taid"
    start: Annotated[float, Field(gt=0, le=1)] = 0.4
    """First t. Small: the student learns mostly itself."""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Last t."""
    rate: Positive = 5e-4
    """α: largest extra rise in a step, beside the straight line from start to end."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of the relative fall of the loss."""

    @model_validator(mode="after")
    def _rising(self) -> Taid:
        if self.end < self.start:
            raise ValueError("target.end is the last t: not below target.start")
        return self


class OneHotMix(Section):
    """(1 − share) · written token + share · teacher (PS-KD, 2006.12000)."""

    kind: Literal["one_hot_mix"] = "one_hot_mix"
    share: float | Ramp
    """Teacher's part. A ramp: PS-KD trusts its own past predictions more and more."""

    @model_validator(mode="after")
    def _in_range(self) -> OneHotMix:
        if not all(0 <= share <= 1 for share in values(self.share)):
            raise ValueError("target.share lies in [0, 1]")
        return self


class Swing(Section):
    """Teacher at T = 1 + (max_temperature − 1)·π, with noise of scale b·π, for privacy scores π (Swing, 2212.08349)."""

    kind: Literal["swing"] = "swing"
    max_temperature: Annotated[float, Field(ge=1)] = 4.0
    """T of a token that is surely private."""
    noise: NotNegative = 0.0
    """b: scale of the Laplace noise on the probabilities of such a token."""


class Bridge(Section):
    """A target ∝ p · q^β between teacher and student (Veto); β = 0 is the teacher."""

    kind: Literal["bridge"] = "bridge"
    beta: NotNegative
    """Of the student's log-probs in the target."""


Target = Annotated[Tempered | Standardised | Taid | OneHotMix | Swing | Bridge, Field(discriminator="kind")]
