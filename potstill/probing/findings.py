"""What a probe may find of a teacher that scores, and from where on nobody should learn from it. The one table. Pure.

A limit is as loose as half-precision arithmetic and changing batches need, and as tight as a lie needs to be seen:
the signal of distillation itself is a few hundredths to a few tenths of a nat per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What one finding may be. `unit` says what is measured; `refusal` what it means beyond `most` or below `least`."""

    unit: str
    refusal: str
    most: float | None = None
    least: float | None = None

    def allows(self, value: float) -> bool:
        """NaN is never allowed."""
        if self.most is not None:
            return value <= self.most
        return self.least is not None and value >= self.least

    @property
    def bound(self) -> str:
        return f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"


LIMITS: Mapping[str, Limit] = {
    "greedy_gap": Limit(
        unit="nats between a token as its top-1 and the same token once it is given",
        refusal="scores stand at other tokens than they belong to, or only some of them are tempered",
        most=0.1,
    ),
    "mass_error": Limit(
        unit="of probability that a top-k and its tail miss or have too much",
        refusal="what it calls log-probs are of no distribution",
        most=1e-3,
    ),
    "noise": Limit(
        unit="nats per token between answers to the same request",
        refusal="its answers differ by as much as a student could learn from them: replicas of different weights, or a "
        "broken cache",
        most=0.1,
    ),
    "batch_gap": Limit(
        unit="nats per token between an item alone and among others, in either order",
        refusal="an item's scores depend on what it is sent with: they are mixed up between items",
        most=0.1,
    ),
    "context_effect": Limit(
        unit="nats per token, above its noise, by which another context moves the same completion",
        refusal="it does not read what comes before a completion",
        least=1e-3,
    ),
    "blankness": Limit(
        unit="of 1, which is the same probability for every token of the vocabulary",
        refusal="it predicts nothing, as a model without its weights does",
        most=0.995,
    ),
}


def refusals(measured: Mapping[str, float]) -> list[str]:
    """Why nobody should learn from a teacher that measured so, one line each. Raises KeyError for an unknown name."""
    return [
        f"{name} {value:.4g} {LIMITS[name].unit} ({LIMITS[name].bound}): {LIMITS[name].refusal}"
        for name, value in measured.items()
        if not LIMITS[name].allows(value)
    ]
