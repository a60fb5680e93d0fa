"""What a run's records say in words: its headline, its comparison, its facts.

Pure: records in, text and rows out. A number that was not recorded is "not measured", never 0, and a change that chance
could explain is called so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.journal import Status
from potstill.metrics import METRICS, MISSING, number

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Accuracy on held-out items at one moment of the run. Parts that were not recorded are None."""

    stage: str
    accuracy: float
    items: int | None
    tokens_trained: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A row of the comparison. `low` and `high` bound a 95% interval where the number of items is known."""

    label: str
    kind: str
    accuracy: float | None
    low: float | None
    high: float | None


def evaluations(events: Sequence[Record]) -> list[Evaluation]:
    """The student's eval.finished events with an accuracy. Before the first step, no token has been trained on."""
    found = []
    for event in events:
        data = event.get("data") or {}
        accuracy = number(data, "accuracy")
        if event.get("type") != "eval.finished" or accuracy is None or data.get("stage") == "teacher":
            continue
        stage, items = str(data.get("stage")), number(data, "items")
        tokens = 0.0 if stage == "before" else number(data, "tokens_trained")
        found.append(
            Evaluation(stage=stage, accuracy=accuracy, items=int(items) if items else None, tokens_trained=tokens)
        )
    return found


def contestants(report: Record, events: Sequence[Record]) -> list[Contestant]:
    """The teacher, the student before and after, and the supervised control where there was one."""
    items = {item.stage: item.items for item in evaluations(events)}
    control = report.get("sft_control")
    rows = [
        _contestant("teacher", "teacher", number(report, "teacher"), None),
        _contestant("student before", "before", number(report, "student_before"), items.get("before")),
        _contestant("student after", "after", number(report, "student_after"), items.get("after")),
    ]
    if isinstance(control, Mapping):
        rows.append(_contestant("SFT control", "control", number(control, "student_after"), None))
    return rows


def wilson(accuracy: float, items: int) -> tuple[float, float]:
    """95% interval of a share seen in `items` trials (Wilson 1927): sensible at 0 and 1, unlike the normal one."""
    z = 1.96
    centre = (accuracy + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * math.sqrt(accuracy * (1 - accuracy) / items + z * z / (4 * items * items))
    return max(0.0, centre - half), min(1.0, centre + half)


def unfinished(subject: str, status: Record, config: Record, metrics: Sequence[Record]) -> str | None:
    """That a run has no result, since which step and why, in one sentence; None when it succeeded.

    Example: "The run failed after step 41 of 200: the learner's process died".
    """
    state, where = status.get("status"), _progress(config, metrics)
    if state == Status.SUCCEEDED:
        return None
    if state == Status.FAILED:
        return f"{subject} failed {where}: {_error(status).get('message') or 'no reason was recorded'}"
    if state == Status.CANCELLED:
        return f"{subject} was cancelled {where}."
    if state is None:
        return f"{subject} never started: its folder holds no status."
    return f"{subject} has not ended: it was last seen {state}, {where}."


def headline(report: Record) -> str:
    """What was achieved, in one sentence."""
    before, after = number(report, "student_before"), number(report, "student_after")
    name = str(report.get("metric") or "accuracy")
    if before is None and after is None:
        return f"The student’s {name} was {MISSING}."
    if before is None or after is None:
        known = f"{_percent(before)} before the run" if after is None else f"{_percent(after)} after the run"
        return f"The student’s {name} was {known}; the other end was {MISSING}."
    if _percent(before) == _percent(after):
        return f"The student’s {name} stayed at {_percent(after)}."
    return f"The student’s {name} {'rose' if after > before else 'fell'} from {_percent(before)} to {_percent(after)}."


def sentences(report: Record, events: Sequence[Record]) -> list[str]:
    """What a reader asks next: how far from the teacher, against what baseline, for how much."""
    candidates = (
        _against_chance(events),
        _against_teacher(report),
        _divergence(report),
        _effort(report),
        _against_control(report),
    )
    return [sentence for sentence in candidates if sentence]


def facts(report: Record) -> list[tuple[str, str]]:
    """The run at a glance, as (name, value); what is absent says so."""
    reverse_kl = METRICS["reverse_kl"]
    words = [(name, str(report.get(name) or "not recorded")) for name in ("recipe", "method", "engine")]
    return [
        *words,
        ("seed", _whole(number(report, "seed"), missing="not recorded")),
        ("steps", _whole(number(report, "steps"))),
        ("loss tokens trained", _whole(number(report, "tokens_trained"))),
        ("loss tokens per second", METRICS["tokens_per_second"].show(number(report, "tokens_per_second"))),
        ("wall time", duration(number(report, "seconds_total"))),
        ("reverse KL, first step", reverse_kl.show_with_unit(number(report, "reverse_kl_first"))),
        ("reverse KL, last step", reverse_kl.show_with_unit(number(report, "reverse_kl_last"))),
        ("weights version", _whole(number(report, "weights_version"))),
        ("peak memory", _gibibytes(number(report, "peak_rss_bytes"))),
        *_paid(report),
    ]


def facts_so_far(status: Record, config: Record, metrics: Sequence[Record]) -> list[tuple[str, str]]:
    """In place of `facts` for a run without a result: who it was and how far it came."""
    error = _error(status)
    return [
        ("status", str(status.get("status") or "not recorded")),
        ("error", f"{error.get('type')}, a problem of the {error.get('category')}" if error else "none recorded"),
        ("method", str(config.get("method") or "not recorded")),
        ("seed", _whole(number(config, "seed"), missing="not recorded")),
        ("last step", _progress(config, metrics)),
        ("loss tokens trained", _whole(number(metrics[-1], "tokens_trained") if metrics else None)),
    ]


def duration(seconds: float | None) -> str:
    """Example: 843.2 is "14 min 3 s"."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _paid(report: Record) -> list[tuple[str, str]]:
    """What each teacher that is paid has cost; nothing where nobody is."""
    found = report.get("teacher_spent")
    rows = []
    for name, spent in found.items() if isinstance(found, Mapping) else ():
        read, written, asked, kept = (
            _whole(number(spent, count)) for count in ("tokens_in", "tokens_out", "answers_asked", "answers_kept")
        )
        value = f"{spent.get('cost_usd', MISSING)} USD, {read} tokens read, {written} written"
        rows.append((f"paid for the {name}", f"{value}; {asked} answers asked for, {kept} known before"))
    return rows


def _progress(config: Record, metrics: Sequence[Record]) -> str:
    """Examples: "after step 41 of 200", "before its first step"."""
    if not metrics:
        return "before its first step"
    planned = number(config.get("loop") or {}, "steps")
    return f"after step {_whole(number(metrics[-1], 'step'))}" + ("" if planned is None else f" of {planned:,.0f}")


def _error(status: Record) -> Record:
    return status.get("error") or {}


def _contestant(label: str, kind: str, accuracy: float | None, items: int | None) -> Contestant:
    low, high = (None, None) if accuracy is None or items is None else wilson(accuracy, items)
    return Contestant(label=label, kind=kind, accuracy=accuracy, low=low, high=high)


def _against_chance(events: Sequence[Record]) -> str | None:
    """A change that the number of items cannot show is called so."""
    by_stage = {item.stage: item for item in evaluations(events)}
    before, after = by_stage.get("before"), by_stage.get("after")
    if before is None or after is None or not before.items or not after.items:
        return None
    variance = sum(item.accuracy * (1 - item.accuracy) / (item.items or 1) for item in (before, after))
    if abs(after.accuracy - before.accuracy) > 1.96 * math.sqrt(variance):
        return None
    return f"With {after.items:,} held-out items, a change of this size may be chance."


def _against_teacher(report: Record) -> str | None:
    before, after, teacher = (number(report, name) for name in ("student_before", "student_after", "teacher"))
    if teacher is None:
        return None
    scores = f"The teacher scores {_percent(teacher)}"
    if before is None or after is None or teacher <= before or after <= before:
        return f"{scores}."
    if after >= teacher:
        return f"{scores}: the student has reached it."
    return f"{scores}: the student closed {(after - before) / (teacher - before):.0%} of the gap."


def _against_control(report: Record) -> str | None:
    control = report.get("sft_control")
    if not isinstance(control, Mapping):
        return None
    accuracy, tokens = number(control, "student_after"), number(control, "tokens_trained")
    if accuracy is None:
        return None
    cost = f" on {tokens:,.0f} tokens" if tokens is not None else ""
    return f"Supervised training of the same student{cost} reached {_percent(accuracy)}."


def _divergence(report: Record) -> str | None:
    first, last = number(report, "reverse_kl_first"), number(report, "reverse_kl_last")
    if first is None or last is None:
        return None
    verb = "fell" if last < first else "went"
    return f"The student’s reverse KL to the teacher {verb} from {first:.3f} to {last:.3f} nats per token."


def _effort(report: Record) -> str | None:
    steps, tokens, seconds = (number(report, name) for name in ("steps", "tokens_trained", "seconds_total"))
    if steps is None or tokens is None or seconds is None:
        return None
    return f"This took {steps:,.0f} steps, {tokens:,.0f} trained tokens and {duration(seconds)}."


def _percent(value: float | None) -> str:
    return METRICS["accuracy"].show(value)


def _whole(value: float | None, *, missing: str = MISSING) -> str:
    return missing if value is None else f"{value:,.0f}"


def _gibibytes(value: float | None) -> str:
    return MISSING if value is None else f"{value / 2**30:.2f} GiB"
