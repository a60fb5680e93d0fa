"""The figures of a report, drawn from plain series. It reads no file, writes none, and never draws a missing number.

Every figure exists twice: as PNG, on white, and as SVG whose colours are the page's CSS variables, so that one drawing
serves light and dark. Lines are named where they end instead of in a legend.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

from orchestrator.pages import COLOURS

INK, MUTED, RULE = COLOURS["--ink"], COLOURS["--muted"], COLOURS["--rule"]
STUDENT, STUDENT_PALE = COLOURS["--student"], COLOURS["--student-pale"]
CONTROL, CONTROL_PALE = COLOURS["--control"], COLOURS["--control-pale"]
STYLE: dict[Any, Any] = {  # matplotlib types its keys as one long Literal
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "potstill",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
WIDTH_IN, HEIGHT_IN = 4.5, 2.9
LABEL_GAP = 0.075  # of the axes' height: the least distance between two labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one curve, in drawing order. Example: Series(x=(0.0, 4096.0), y=(0.12, 0.31))."""

    x: Sequence[float]
    y: Sequence[float]

    def __bool__(self) -> bool:
        return len(self.x) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyCurve:
    """One way of training: its held-out evaluations, and the accuracy of the completions that it trained on."""

    label: str
    held_out: Series
    rollouts: Series


def draw_accuracy(student: AccuracyCurve, control: AccuracyCurve | None, teacher: float | None) -> Figure:
    """Accuracy over trained tokens: a dot per held-out evaluation, a pale line for the step's own rollouts."""
    with rc_context(STYLE):
        figure, axes = _figure("loss tokens trained", "accuracy")
        labels: list[tuple[float, str, str]] = []
        for curve, colour, pale in ((student, STUDENT, STUDENT_PALE), (control, CONTROL, CONTROL_PALE)):
            if curve is None:
                continue
            if curve.rollouts:
                axes.plot(curve.rollouts.x, curve.rollouts.y, color=pale, linewidth=1.0)
            if curve.held_out:
                axes.plot(curve.held_out.x, curve.held_out.y, color=colour, marker="o", markersize=3.6)
            named = curve.held_out or curve.rollouts
            if named:
                labels.append((named.y[-1], curve.label, colour))
        if teacher is not None:
            axes.axhline(teacher, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            labels.append((teacher, "teacher", INK))
        axes.set_xlim(left=0)
        axes.set_ylim(0, min(1.04, 1.12 * max(axes.get_ylim()[1], 0.05)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _name_at_the_right(axes, labels)
        return figure


def draw_reverse_kl(curve: Series) -> Figure:
    """Reverse KL per step, pale, and its running mean. The axis shows zero: what is left is visible."""
    with rc_context(STYLE):
        figure, axes = _figure("step", "reverse KL, nats per token")
        smooth = running_mean(curve)
        axes.plot(curve.x, curve.y, color=STUDENT_PALE, linewidth=1.0, marker="o" if len(curve.x) == 1 else None)
        axes.plot(smooth.x, smooth.y, color=STUDENT)
        axes.set_xlim(0, max(curve.x))
        axes.set_ylim(bottom=min(0.0, *curve.y))  # an estimate from sampled tokens may be negative
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        return figure


def draw_length(tokens: Series, truncated: Series) -> Figure:
    """Mean completion length above, share of completions cut at the limit below, over the same steps."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for axes, curve, title in ((upper, tokens, "completion, tokens"), (lower, truncated, "cut at the limit")):
            axes.plot(curve.x, curve.y, color=STUDENT, marker="o" if len(curve.x) == 1 else None)
            axes.set_title(title)
            axes.set_ylim(0, _headroom(curve))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
            axes.grid(axis="y", color=RULE, linewidth=0.6)
            axes.set_axisbelow(True)
        lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        lower.set_xlim(0, max(tokens.x))
        lower.set_xlabel("step")
        return figure


def draw_time(seconds: Mapping[str, float]) -> Figure:
    """One bar per kind of work. Kinds may overlap in time, so they are not stacked into a whole."""
    with rc_context(STYLE):
        height = min(HEIGHT_IN, 0.75 + 0.36 * len(seconds))
        figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
        axes = figure.subplots()
        names = list(seconds)[::-1]
        values = [seconds[name] for name in names]
        bars = axes.barh(names, values, color=STUDENT, height=0.6)
        axes.bar_label(bars, labels=[f"{value:,.1f} s" for value in values], padding=4, color=INK)
        axes.set_xlim(0, 1.18 * max(values) or 1.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, colors=INK)
        axes.set_xlabel("seconds")
        return figure


def running_mean(curve: Series) -> Series:
    """The mean of each point and its neighbours, a twentieth of the curve in all, and fewer near the ends."""
    reach = len(curve.y) // 40
    near = [curve.y[max(0, centre - reach) : centre + reach + 1] for centre in range(len(curve.y))]
    return Series(x=curve.x, y=[sum(values) / len(values) for values in near])


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move ascending positions upward as little as needed for neighbours to be `gap` apart."""
    placed: list[float] = []
    for position in positions:
        placed.append(max(position, placed[-1] + gap) if placed else position)
    return placed


def png(figure: Figure) -> bytes:
    """The figure on white, sharp on a screen of two pixels to the point."""
    return _print(figure, "png")


def svg(figure: Figure, name: str) -> str:
    """An <svg> element for a page that defines the variables of COLOURS. Ids begin with `name`, unique on the page."""
    text = _print(figure, "svg").decode()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)


def _print(figure: Figure, format: Literal["png", "svg"]) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    undated = {"Date": None} if format == "svg" else None  # equal figures give equal bytes
    with rc_context(STYLE):
        figure.savefig(buffer, format=format, dpi=200, transparent=format == "svg", metadata=undated)
    return buffer.getvalue()


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_title(y_label)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _headroom(curve: Series) -> float:
    return 1.15 * max(curve.y, default=0.0) or 1.0


def _name_at_the_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each label beside the right edge at its line's height, moved apart where lines end close together."""
    ordered = sorted(labels)
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for value, _, _ in ordered], LABEL_GAP)
    for height, (_, label, colour) in zip(heights, ordered, strict=True):
        axes.text(1.02, height, label, transform=axes.transAxes, color=colour, va="center")
