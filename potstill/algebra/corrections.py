"""Factors for text that another policy wrote: older weights, other numerics, a truncated sampler.

Choices only; ρ = q / μ, student now over sampler. learner/corrections.py computes them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potstill.section import NotNegative, Positive, Section, Unit


class Ignored(Section):
    """No ratio: exact losses at the states that were visited."""

    kind: Literal["ignored"] = "ignored"


class Unclipped(Section):
    """ρ = q / μ of the token: unbiased for any sampler, and of any variance."""

    kind: Literal["unclipped"] = "unclipped"


class Truncated(Section):
    """min(ρ, cap) (TIS)."""

    kind: Literal["truncated"] = "truncated"
    cap: Positive = 2.0
    """Too small: biased towards the sampler; too large: a few tokens rule."""
    level: Literal["token", "sequence"] = "token"
    """sequence: the product over the completion, as one ratio for all its tokens."""


class Masked(Section):
    """ρ where low ≤ ρ ≤ high, else 0 (IcePop by token, MIS by sequence)."""

    kind: Literal["masked"] = "masked"
    low: NotNegative = 0.5
    """Smallest ratio that still teaches."""
    high: Positive = 2.0
    """Largest."""
    level: Literal["token", "sequence"] = "token"
    """As of "truncated"."""


class GeometricRejection(Section):
    """1 for sequences whose mean ratio (geometric) lies in [low, high], else 0."""

    kind: Literal["geometric_rejection"] = "geometric_rejection"
    low: Positive = 0.999
    """Smallest mean ratio."""
    high: Positive = 1.001
    """Largest."""


class Clipped(Section):
    """PPO's trust region: ρ, and 0 where min(ρA, clip(ρ)A) has no gradient."""

    kind: Literal["clipped"] = "clipped"
    low: Unit = 0.2
    """Ratios below 1 − low no longer push a bad token down."""
    high: Positive = 0.2
    """Ratios above 1 + high no longer push a good token up."""


Correction = Annotated[
    Ignored | Unclipped | Truncated | Masked | GeometricRejection | Clipped, Field(discriminator="kind")
]
