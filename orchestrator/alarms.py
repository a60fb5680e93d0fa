"""Whether a step's numbers are those of a healthy run: numbers in, alarms out. Pure.

    metrics of a step ──► each rule: value beyond its bound? ──► for `patience` steps in a row ──► an Alarm

A rule compares one metric with a threshold, as it stands or times a yardstick: another metric of the step, or what the
metric was at the run's own beginning. It acts on nothing: whoever asked warns, pauses or stops. A number that was not
measured rings no alarm and is never 0; `silent` says which alarms that leaves without a voice.

What no run survives raises an error where it happens and is no rule: a loss, gradient or score that is not finite
(NonFinite), weights whose checksum does not match (WeightsError), a canary that dies (RunError, SignalLost).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from potstill.config import RunConfig
from potstill.config_alarms import Action, AlarmConfig, AlarmsConfig

BEGINNING = "beginning"
OWN_TEXT = "staleness_mean"
"""A metric of steps in which a version of the student wrote. Of other text, length and entropy say nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something is wrong with the signal of a step. `message` has number, bound, meaning and what to do."""

    name: str
    action: Action  # never "off"
    step: int
    value: float
    bound: float
    message: str

    @property
    def level(self) -> str:
        """Of the journal's event."""
        return "warn" if self.action == "warn" else "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`name` is the alarm's in [alarms]; `means` and `advice` are for whoever reads it at night."""

    name: str
    metric: str
    side: Literal["above", "below"]
    times: str | None = None  # another metric, or BEGINNING, by which the threshold is multiplied
    needs: str | None = None  # a metric without which the step is not judged
    unless: str | None = None  # a metric with which another rule judges better
    means: str
    advice: str

    def beyond(self, value: float, bound: float) -> bool:
        return value > bound if self.side == "above" else value < bound


RULES = (
    Rule(
        name="length",
        metric="completion_tokens",
        side="above",
        times=BEGINNING,
        needs=OWN_TEXT,
        means="the student's answers inflate, often on the way to loops and collapse",
        advice="look at samples.jsonl; lower optim.lr, anchor with a supervised term, or average per sequence",
    ),
    Rule(
        name="truncation",
        metric="truncated_fraction",
        side="above",
        needs=OWN_TEXT,
        means="most answers are cut before their end, so that the student does not learn to stop",
        advice="raise rollout.sampling.max_new_tokens, or treat it as length inflation",
    ),
    Rule(
        name="repetition",
        metric="repetition_p90",
        side="above",
        needs=OWN_TEXT,
        means="at least one answer in ten ends in a loop, which teachers find easy to agree with",
        advice="look at samples.jsonl; go back to an earlier checkpoint with a lower optim.lr or a supervised term",
    ),
    Rule(
        name="entropy",
        metric="entropy",
        side="below",
        times="teacher_entropy",
        needs=OWN_TEXT,
        means="the student is much surer than its teacher: its samples no longer show it anything else",
        advice="use a divergence that covers (jsd, forward_kl), add an entropy term, or lower optim.lr",
    ),
    Rule(
        name="entropy_drop",
        metric="entropy",
        side="below",
        times=BEGINNING,
        needs=OWN_TEXT,
        unless="teacher_entropy",
        means="the student is much surer than it was: it always writes the same",
        advice="compare samples.jsonl of early and late steps; add an entropy term, or lower optim.lr",
    ),
    Rule(
        name="captured_mass",
        metric="captured_mass",
        side="below",
        means="the student hides its mass outside the top-k, where the loss hardly sees it",
        advice='raise objective.support.k, or use rest = "tail" or support = "student_topk"',
    ),
    Rule(
        name="captured_mass_teacher",
        metric="captured_mass_teacher",
        side="below",
        means="what the teacher would say is not among the ids that are compared",
        advice='raise objective.support.k, use support = "teacher_topk", or warm the student up on the teacher\'s text',
    ),
    Rule(
        name="overlap",
        metric="overlap",
        side="below",
        means="student and teacher hardly share a token",
        advice="check the chat templates; warm the student up on the teacher's text, or take a teacher of its family",
    ),
    Rule(
        name="staleness",
        metric="staleness_kl",
        side="above",
        times="staleness_max",
        means="the student has moved further from the text it learns than that text's age explains",
        advice="lower loop.max_staleness or optim.lr, or set objective.correction",
    ),
    Rule(
        name="sampler_gap",
        metric="sampler_gap",
        side="above",
        means="engine and learner disagree on the student's own text at the same weights",
        advice="check dtype and engine of the rollout workers; the transformers engine is exact",
    ),
    Rule(
        name="teacher_gap",
        metric="reverse_kl",
        side="above",
        needs=OWN_TEXT,
        means="the teacher finds the student's text very unlikely: they read different prompts, or the run diverges",
        advice="compare both sides' rendered token ids, then lower optim.lr or warm the student up",
    ),
    Rule(
        name="unscored",
        metric="unscored_fraction",
        side="above",
        means="the teacher fails to score tokens, which are then not trained on",
        advice="see teacher.log and the teacher's limits; loop.max_unscored_fraction is where the run stops",
    ),
)


@dataclass(slots=True, kw_only=True)
class _Watch:
    """One rule in one run."""

    rule: Rule
    config: AlarmConfig
    first: int  # measured steps that are the run's beginning
    streak: int = 0  # steps in a row that were out of bounds
    beginning: list[float] = field(default_factory=list)

    def judged(self, metrics: Mapping[str, float]) -> tuple[float, float] | None:
        """Value and bound of this step; None where it cannot be judged. The beginning is gathered on the way."""
        rule = self.rule
        value = _measured(metrics, rule.metric)
        if value is None or (rule.needs and _measured(metrics, rule.needs) is None):
            return None
        if rule.unless and _measured(metrics, rule.unless) is not None:
            return None
        if rule.times is None:
            return value, self.config.threshold
        yardstick = self._since_beginning(value) if rule.times == BEGINNING else _measured(metrics, rule.times)
        return None if yardstick is None else (value, self.config.threshold * yardstick)

    def _since_beginning(self, value: float) -> float | None:
        if len(self.beginning) < self.first:
            self.beginning.append(value)
            return None
        return statistics.median(self.beginning)


class Alarms:
    """The alarms of one run. `mute`: those that this run cannot have, and why (see `watch`)."""

    def __init__(self, config: AlarmsConfig, mute: Mapping[str, str] | None = None) -> None:
        self._mute = dict(mute or {})
        settings = {rule.name: getattr(config, rule.name) for rule in RULES}
        self._watches = {
            rule.name: _Watch(rule=rule, config=settings[rule.name], first=config.beginning)
            for rule in RULES
            if settings[rule.name].action != "off" and rule.name not in self._mute
        }

    def look(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """What is wrong since this step. An alarm sounds once, and again only after a step within bounds."""
        found = []
        for watch in self._watches.values():
            judged = watch.judged(metrics)
            if judged is None:
                continue
            watch.streak = watch.streak + 1 if watch.rule.beyond(*judged) else 0
            if watch.streak == watch.config.patience:
                found.append(_alarm(watch, step, *judged))
        return found

    def silent(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Alarms that are wanted and that such a step cannot sound, and why; to be said once, after the first step."""
        missing = {
            name: f"{metric} was not measured"
            for name, watch in self._watches.items()
            for metric in (watch.rule.metric, watch.rule.needs, watch.rule.times)
            if metric is not None and metric != BEGINNING and _measured(metrics, metric) is None
        }
        return self._mute | missing

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {name: {"streak": w.streak, "beginning": list(w.beginning)} for name, w in self._watches.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. An alarm that had sounded counts anew: who resumes gives the run its patience.

        One that was not watched then begins now; one that is no longer watched is forgotten.
        """
        for name, watch in self._watches.items():
            saved = state.get(name, {"streak": 0, "beginning": []})
            watch.beginning = list(saved["beginning"])
            watch.streak = saved["streak"] if saved["streak"] < watch.config.patience else 0


def watch(config: RunConfig) -> Alarms:
    """The alarms of a run, less those that its settings leave without a meaning."""
    sampling = config.rollout.sampling
    mute: dict[str, str] = {}
    if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
        mute = dict.fromkeys(("sampler_gap", "staleness"), "text is not sampled from the student as it is")
    elif config.rollout.view == "privileged":
        mute = dict.fromkeys(("sampler_gap", "staleness"), "text is sampled under the teacher's prompt")
    elif config.loop.max_staleness == 0:
        mute = {"staleness": "loop.max_staleness is 0: no text is stale"}
    return Alarms(config.alarms, mute)


def _alarm(watch: _Watch, step: int, value: float, bound: float) -> Alarm:
    rule, config = watch.rule, watch.config
    yardstick = "" if rule.times is None else f" ({config.threshold:g} × {rule.times.replace('_', ' ')})"
    since = "" if config.patience == 1 else f" for {config.patience} steps"
    return Alarm(
        name=rule.name,
        action=config.action,
        step=step,
        value=value,
        bound=bound,
        message=f"{rule.metric} is {value:.4g}, {rule.side} {bound:.4g}{yardstick}{since}: {rule.means}; {rule.advice}",
    )


def _measured(metrics: Mapping[str, float], name: str) -> float | None:
    """None where it is absent or NaN. An infinite number is one, and beyond every bound."""
    value = metrics.get(name)
    return None if value is None or math.isnan(value) else value
