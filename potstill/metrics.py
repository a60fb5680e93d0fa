"""Every name that a step writes to metrics.jsonl, with unit and meaning: one table for display, report and docs.

It refuses to invent numbers: what is absent, null or not finite is None here, and a person reads that it is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MISSING = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number of a step. Example: METRICS["accuracy"].show(0.612) == "61.2%"."""

    name: str
    unit: str  # empty for counts of nothing in particular, ratios and percentages
    phrase: str
    format: str  # a Python format specification

    def show(self, value: float | None, *, missing: str = MISSING) -> str:
        """The number as people read it, without its unit; `missing` when there is none."""
        return missing if value is None else format(value, self.format)

    def show_with_unit(self, value: float | None, *, missing: str = MISSING) -> str:
        if value is None:
            return missing
        return f"{self.show(value)} {self.unit}".rstrip()


def number(record: Mapping[str, Any], name: str) -> float | None:
    """record[name] as a finite float; None when it is absent, null, NaN, infinite or not a number."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _row(name: str, unit: str, phrase: str, format: str) -> Metric:
    return Metric(name=name, unit=unit, phrase=phrase, format=format)


_SECONDS = ",.2f"
_TABLE = (
    _row("step", "", "optimizer step, counted from 1", ",.0f"),
    _row("loss", "nats", "the objective, as the method defines it", ".4f"),
    _row("reverse_kl", "nats/token", "KL(student ‖ teacher), mean over loss tokens", ".3f"),
    _row("accuracy", "", "share of the step's own rollouts that the verifier calls right", ".1%"),
    _row("tied_fraction", "", "completions of prompts whose completions all earned the same", ".1%"),
    _row("discriminator_loss", "nats", "of the discriminator, before it learns from the step; log 2 is chance", ".4f"),
    _row("discriminator_accuracy", "", "student's completions that it scores below the other text", ".1%"),
    _row("reward_student", "", "discriminator's mean score of the student's completions", ".3f"),
    _row("reward_others", "", "discriminator's mean score of the other text", ".3f"),
    _row("entropy", "nats/token", "entropy of the student's next-token distribution", ".3f"),
    _row("teacher_entropy", "nats/token", "entropy of the teacher's; what lies outside a top-k is one outcome", ".3f"),
    _row("overlap", "", "probability that student and teacher share, Σ min(q, p)", ".1%"),
    _row("captured_mass", "", "student's probability inside the objective's top-k", ".1%"),
    _row("captured_mass_teacher", "", "teacher's probability inside the objective's top-k", ".1%"),
    _row("completion_tokens", "tokens", "mean length of a completion", ",.1f"),
    _row("truncated_fraction", "", "completions cut at the length limit", ".1%"),
    _row("repetition_p90", "", "zlib ratio of a completion's end that one in ten exceeds; above 10 is a loop", ".1f"),
    _row("unscored_fraction", "", "loss tokens that the teacher could not score", ".1%"),
    _row("grad_norm", "", "global gradient norm before clipping", ".3g"),
    _row("lr", "", "learning rate of the step", ".2e"),
    _row("ratio_mean", "", "mean importance ratio, student now / student at sampling", ".3f"),
    _row("sampler_gap", "nats/token", "sampler and learner apart on the text of the same weights", ".2g"),
    _row("staleness_kl", "nats/token", "KL(sampler ‖ student now), k3 estimate on text of older versions", ".2g"),
    _row("staleness_mean", "versions", "mean age of a rollout when it is trained on", ".1f"),
    _row("staleness_max", "versions", "largest age of a rollout when it is trained on", ",.0f"),
    _row("queue", "rollouts", "scored rollouts waiting to be trained on", ",.0f"),
    _row("refused", "prompts", "scored prompts that were too old when their turn came, since the run began", ",.0f"),
    _row("tokens_trained", "tokens", "loss tokens trained on since the run began", ",.0f"),
    _row("tokens_per_second", "tokens/s", "loss tokens trained per second", ",.0f"),
    _row("teacher_tokens", "tokens", "tokens that black-box teachers have read and written", ",.0f"),
    _row("teacher_usd", "USD", "what black-box teachers have cost, by the config's prices", ",.4f"),
    _row("seconds_total", "s", "wall time since the run began", _SECONDS),
    _row(
        "seconds_generate",
        "s",
        "waiting for completions and their scores",
        _SECONDS,
    ),
    _row("seconds_train", "s", "forward, backward and optimizer", _SECONDS),
    _row("seconds_weights", "s", "publishing new weights to the rollout workers", _SECONDS),
    _row("seconds_step", "s", "the whole step", _SECONDS),
    _row("weights_version", "", "version of the student that the step made", ",.0f"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}
