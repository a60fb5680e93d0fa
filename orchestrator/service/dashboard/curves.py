"""Which curves a run's page draws, from which of its numbers. The one table; the browser draws what exists. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from potstill.metrics import METRICS


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One number of a step over the steps. `format` is how a browser shows it: share, plain or whole."""

    key: str
    label: str
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A figure: its steps are pale and their running mean is strong. `zero`: its axis shows zero."""

    name: str
    title: str
    unit: str
    lines: Sequence[Line]
    zero: bool = True
    chief: bool = False  # one of those that are looked at first, and larger
    held_out: bool = False  # held-out evaluations are dots on it


_OWN, _OTHERS = "own rollouts", "the text it reads"


def _line(key: str, label: str) -> Line:
    spec = METRICS[key].format
    return Line(key=key, label=label, format="share" if spec.endswith("%") else "whole" if spec == ",.0f" else "plain")


CURVES = (
    Curve(
        name="reverse_kl",
        title="Reverse KL to the teacher",
        unit="nats per token",
        lines=[_line("reverse_kl", "reverse KL")],
        chief=True,
    ),
    Curve(
        name="accuracy",
        title="Accuracy",
        unit="",
        lines=[_line("accuracy", _OWN)],
        chief=True,
        held_out=True,
    ),
    Curve(name="loss", title="Loss", unit="nats", lines=[_line("loss", "loss")], zero=False),
    Curve(
        name="length",
        title="Length of completions",
        unit="tokens",
        lines=[_line("completion_tokens", "mean length")],
    ),
    Curve(
        name="truncated",
        title="Cut at the length limit",
        unit="",
        lines=[_line("truncated_fraction", "share of completions")],
    ),
    Curve(
        name="entropy",
        title="Entropy",
        unit="nats per token",
        lines=[_line("entropy", "student"), _line("teacher_entropy", "teacher")],
    ),
    Curve(
        name="staleness",
        title="Staleness of rollouts",
        unit="versions",
        lines=[_line("staleness_mean", "mean"), _line("staleness_max", "largest")],
    ),
    Curve(
        name="throughput",
        title="Throughput",
        unit="loss tokens per second",
        lines=[_line("tokens_per_second", "tokens/s")],
    ),
    Curve(
        name="seconds",
        title="Seconds of a step",
        unit="s",
        lines=[
            _line("seconds_generate", "generate"),
            _line("seconds_train", "train"),
            _line("seconds_weights", "publish"),
        ],
    ),
    Curve(name="cost", title="Cost of black-box teachers", unit="USD", lines=[_line("teacher_usd", "so far")]),
    Curve(name="grad_norm", title="Gradient norm", unit="before clipping", lines=[_line("grad_norm", "norm")]),
)

COMPARED = tuple(curve for curve in CURVES if curve.name in {"reverse_kl", "accuracy", "length", "throughput"})


def drawn(keys: Collection[str], curves: Sequence[Curve] = CURVES, *, own_text: bool = True) -> list[Curve]:
    """The curves of which at least one number is among `keys`, and of each only such lines.

    `own_text`: the student writes what it is trained on; the accuracy of other text is not its own.
    """
    some = (replace(curve, lines=[line for line in curve.lines if line.key in keys]) for curve in curves)
    return [curve if own_text else _of_others(curve) for curve in some if curve.lines]


def _of_others(curve: Curve) -> Curve:
    lines = [replace(line, label=_OTHERS) if line.label == _OWN else line for line in curve.lines]
    return replace(curve, lines=lines)
