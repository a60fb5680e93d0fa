"""The report of a run, made from its folder alone: report.html, one self-contained page, and its figures as PNG.

    status.json report.json config.json metrics.jsonl events.jsonl samples.jsonl [sft_control/] ──► report.html *.png

It measures nothing and starts nothing. A number that the folder does not hold is "not measured" on the page, never 0;
a run that did not succeed has no result there, only how and where it ended; text that a model wrote is escaped, and the
page allows no script and no request.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from orchestrator import findings, heatmap, plots
from orchestrator.pages import COLOURS, environment, flatten
from orchestrator.plots import AccuracyCurve, Series
from potstill.errors import RunError
from potstill.journal import Status, read_jsonl, steps_in, write_atomically
from potstill.metrics import MISSING, number

Record = Mapping[str, Any]

STAGES = {
    "seconds_generate": "generate, score",
    "seconds_train": "train",
    "seconds_weights": "publish",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """What a folder holds, read once."""

    name: str
    status: Record
    report: Record
    config: Record
    metrics: Sequence[Record]
    events: Sequence[Record]
    samples: Sequence[Record]

    @property
    def succeeded(self) -> bool:
        return self.status.get("status") == Status.SUCCEEDED

    def unfinished(self, subject: str) -> str | None:
        return findings.unfinished(subject, self.status, self.config, self.metrics)


def write_report(folder: Path) -> None:
    """Write report.html and the figures that the folder's records allow. Raises OSError when it cannot write."""
    run = read_folder(folder)
    control = read_folder(folder / "sft_control") if (folder / "sft_control" / "metrics.jsonl").exists() else None
    figures = draw(run, control)
    for name, figure in figures.items():
        write_atomically(folder / f"{name}.png", plots.png(figure))
    write_atomically(folder / "report.html", render(run, control, figures).encode())


@contextlib.contextmanager
def page_of_a_bad_ending(folder: Path) -> Iterator[None]:
    """Write the report when what is inside raises. That is what goes on, also when the page cannot be written."""
    with contextlib.ExitStack() as stack:
        stack.callback(_write_where_possible, folder)
        yield
        stack.pop_all()


def read_folder(folder: Path) -> RunFolder:
    return RunFolder(
        name=folder.name,
        status=_read_json(folder / "status.json"),
        report=_read_json(folder / "report.json"),
        config=_read_json(folder / "config.json"),
        metrics=steps_in(folder),
        events=list(read_jsonl(folder / "events.jsonl")),
        samples=list(read_jsonl(folder / "samples.jsonl")),
    )


def draw(run: RunFolder, control: RunFolder | None) -> dict[str, Figure]:
    """The figures for which there is something to draw, by name."""
    student_curve = accuracy_curve(run, "student")
    control_curve = None
    if control and control.succeeded:  # otherwise its last point is no result
        control_curve = accuracy_curve(control, "SFT control")
    if control_curve and control_curve.held_out:  # the texts of a supervised run are not its student's own
        control_curve = replace(control_curve, rollouts=Series(x=(), y=()))
    reverse_kl = series(run.metrics, "step", "reverse_kl")
    length = series(run.metrics, "step", "completion_tokens")
    seconds = seconds_by_stage(run)
    figures: dict[str, Figure] = {}
    if student_curve.held_out or student_curve.rollouts:
        figures["accuracy"] = plots.draw_accuracy(student_curve, control_curve, number(run.report, "teacher"))
    if reverse_kl:
        figures["reverse_kl"] = plots.draw_reverse_kl(reverse_kl)
    if length:
        figures["length"] = plots.draw_length(length, series(run.metrics, "step", "truncated_fraction"))
    if seconds:
        figures["time"] = plots.draw_time(seconds)
    return figures


def render(run: RunFolder, control: RunFolder | None, figures: Mapping[str, Figure]) -> str:
    """The page. Everything but our own SVG passes through the template's escaping."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run_id=str(run.report.get("run_id") or run.name),
            metric=str(run.report.get("metric") or "accuracy"),
            unfinished=run.unfinished("The run"),
            unfinished_control=control.unfinished("The supervised control") if control else None,
            headline=findings.headline(run.report),
            sentences=findings.sentences(run.report, run.events),
            contestants=findings.contestants(run.report, run.events),
            colours=COLOURS,
            figures={name: Markup(plots.svg(figure, name)) for name, figure in figures.items()},  # noqa: S704  our drawing
            samples=[heatmap.read_sample(record) for record in heatmap.choose(run.samples)],
            num_samples=len(run.samples),
            legend=heatmap.legend(),
            facts=findings.facts(run.report),
            facts_so_far=findings.facts_so_far(run.status, run.config, run.metrics),
            config=flatten(run.config),
            numbers=flatten(run.report),
            missing=MISSING,
        )
    )


def series(records: Sequence[Record], x: str, y: str) -> Series:
    """The records that have both numbers; the others leave no point."""
    pairs = [(number(record, x), number(record, y)) for record in records]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    return Series(x=[a for a, _ in whole], y=[b for _, b in whole])


def accuracy_curve(run: RunFolder, label: str) -> AccuracyCurve:
    """Accuracy over trained tokens, of held-out items and of the rollouts that were trained on."""
    found = [item for item in findings.evaluations(run.events) if item.tokens_trained is not None]
    held_out = Series(x=[item.tokens_trained or 0.0 for item in found], y=[item.accuracy for item in found])
    rollouts = series(run.metrics, "tokens_trained", "accuracy")
    return AccuracyCurve(label=label, held_out=held_out, rollouts=rollouts)


def seconds_by_stage(run: RunFolder) -> dict[str, float]:
    """report.json's seconds_by_phase, else the sums of the steps' own seconds. Stages never measured are left out."""
    reported = run.report.get("seconds_by_phase") or {}
    measured = {str(name).replace("_", " "): number(reported, name) for name in reported}
    if not measured:
        for name, label in STAGES.items():
            values = [value for record in run.metrics if (value := number(record, name)) is not None]
            measured[label] = sum(values) if values else None
    return {label: value for label, value in measured.items() if value is not None}


def _write_where_possible(folder: Path) -> None:
    with contextlib.suppress(OSError, RunError):
        write_report(folder)


def _read_json(path: Path) -> Record:
    """An absent file is an empty record: a run that failed early still gets its page."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return content if isinstance(content, Mapping) else {}
