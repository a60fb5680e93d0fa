"""What a person sees while a run goes on: a live panel on a terminal, plain aligned lines elsewhere.

A display is a listener of `potstill.journal.Journal`. It refuses to disturb the run: records are read forgivingly, and
when the reader of its output goes away it falls silent. It decides nothing and stores nothing.

    journal record ──► Display.__call__ ──► Progress (what is known) ──► LiveDisplay, repainted by rich's own thread
                                                                    └──► PlainDisplay, a line at a time
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from potstill.metrics import METRICS, number
from potstill.progress import NOTED, Phase, Progress, State, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PLAIN_INTERVAL_S = 2.0  # at most one line of step numbers in this time
LABELS = {"reverse_kl": "reverse KL", "loss": "loss", "accuracy": "accuracy"}
SPARK_WIDTH = 24
BLOCKS = "▁▂▃▄▅▆▇█"
DASH = "–"
MARK_STYLES = {State.WAITING: "dim", State.ACTIVE: "cyan", State.DONE: "green", State.FAILED: "red"}


class Display:
    """Follows a run, and every phase of a longer piece of work, in one place. Subclasses show it."""

    def __init__(self, title: str, progress: Progress, clock: Callable[[], float]) -> None:
        self.title = printable(title)
        self.progress = progress
        self._clock = clock
        self._lock = threading.RLock()  # the panel is painted by another thread
        self._opened = clock()

    def begin(self, phase: str, total_steps: int | None = None) -> None:
        """The next records belong to `phase`; `total_steps` replaces what was given in advance."""
        with self._lock:
            self.progress.begin(phase, total_steps, self._clock())

    def __call__(self, stream: str, record: Mapping[str, Any]) -> None:
        with self._lock:
            if stream == "metrics":
                self.progress.take_metrics(record, self._clock())
            elif stream == "event":
                self.progress.take_event(record, self._clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self.progress.end(State.DONE if kind is None else State.FAILED, self._clock())


class PlainDisplay(Display):
    """Lines for a log file or a pipe: phases, evaluations and warnings as they come, steps every few seconds."""

    def __init__(self, title: str, progress: Progress, clock: Callable[[], float], out: TextIO) -> None:
        super().__init__(title, progress, clock)
        self._out = out
        self._last_line: float | None = None
        self._held_back: Phase | None = None  # its latest step has not been written yet

    def begin(self, phase: str, total_steps: int | None = None) -> None:
        with self._lock, self._phase_line():
            super().begin(phase, total_steps)

    def __call__(self, stream: str, record: Mapping[str, Any]) -> None:
        with self._lock, self._phase_line():
            super().__call__(stream, record)
        with self._lock:
            if stream == "metrics" and self.progress.active is not None:
                self._step(self.progress.active)
            elif stream == "event" and record.get("type") != "phase.started":
                self._event(record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._write_held_back()
        super().__exit__(kind, error, trace)

    @contextmanager
    def _phase_line(self) -> Iterator[None]:
        """Write a line when what is inside has begun another phase, or renamed the active one."""
        active = self.progress.active
        name = active.name if active else None
        yield
        if self.progress.active is not None and self.progress.active.name != name:
            self._write_held_back()
            self._line(f"{self.progress.active.name} begins")

    def _step(self, phase: Phase) -> None:
        now = self._clock()
        self._held_back = phase
        due = self._last_line is None or now - self._last_line >= PLAIN_INTERVAL_S
        if due or phase.step == phase.total_steps:
            self._write_held_back()
            self._last_line = now

    def _event(self, record: Mapping[str, Any]) -> None:
        loud = record.get("level") in {"warn", "error"} or record.get("type") in NOTED
        data = record.get("data") or {}
        if record.get("type") == "eval.finished":
            text = f"held-out accuracy {METRICS['accuracy'].show(number(data, 'accuracy'))}, {data.get('stage')}"
        elif loud:
            text = printable(record.get("message"))
        else:
            return
        self._write_held_back()
        self._line(printable(text))

    def _write_held_back(self) -> None:
        phase, self._held_back = self._held_back, None
        if phase is not None:
            widest = max(len(phase.name) for phase in self.progress.phases)
            self._line(f"{phase.name:<{widest}}  {_step_line(phase, self._clock())}")

    def _line(self, text: str) -> None:
        self._out.write(f"{_clock_text(self._clock() - self._opened):>8}  {text}\n")
        self._out.flush()


class LiveDisplay(Display):
    """A panel that is repainted in place, four times a second, by rich's own thread."""

    def __init__(self, title: str, progress: Progress, clock: Callable[[], float], console: Console) -> None:
        from rich.live import Live

        super().__init__(title, progress, clock)
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self.panel)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._live.stop()

    def panel(self) -> RenderableType:
        """The whole picture of this moment. Its number of lines does not depend on what has been measured."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        with self._lock:
            now = self._clock()
            shown = self.progress.shown
            body = Group(
                _phase_table(self.progress.phases, now),
                Text(),
                _curve_table(shown),
                Text(_speed_line(shown.latest), style="dim", no_wrap=True, overflow="ellipsis"),
                Text(self.progress.notice, style="dim", no_wrap=True, overflow="ellipsis"),
            )
            elapsed = _clock_text(now - self._opened)
        title, subtitle = Text(f" {self.title} ", style="bold"), Text(f" {elapsed} ", style="dim")
        return Panel(body, title=title, title_align="left", subtitle=subtitle, subtitle_align="right",
                     border_style="dim", padding=(1, 2, 0, 2))  # fmt: skip


def make_display(
    total_steps: int | None,
    title: str,
    *,
    file: TextIO,
    phases: Mapping[str, int | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Display:
    """A panel when `file` is a terminal that can move its cursor, plain lines otherwise.

    `phases` maps the names of phases that will follow each other to their steps (None: said later, by `begin` or by a
    phase.started event with `total_steps`). Without it the run is one phase of `total_steps`.
    """
    progress = Progress(total_steps, phases or {})
    out = cast("TextIO", _UntilClosed(file))
    if out.isatty():
        from rich.console import Console

        console = Console(file=out, highlight=False)
        if console.is_terminal and not console.is_dumb_terminal:
            return LiveDisplay(title, progress, clock, console)
    return PlainDisplay(title, progress, clock, out)


class _UntilClosed(io.TextIOBase):
    """`file` until its reader goes away, then nothing: a display that nobody sees is no reason to end a run."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._gone = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._file.encoding or "utf-8"

    def isatty(self) -> bool:
        return not self._file.closed and self._file.isatty()

    def write(self, text: str) -> int:
        """A character that the terminal's encoding lacks is written as a question mark."""
        representable = text.encode(self.encoding, "replace").decode(self.encoding)
        self._attempt(lambda: self._file.write(representable))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._file.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._gone or self._file.closed:
            return
        try:
            action()
        except OSError:  # BrokenPipeError from a pipe, EIO from a terminal that hung up
            self._gone = True


def _phase_table(phases: Sequence[Phase], now: float) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, no_wrap=True)
    table.add_column(justify="right", min_width=max(2 * len(str(phase.total_steps or "")) + 1 for phase in phases))
    table.add_column(justify="right", min_width=len("00:00 left"))
    for phase in phases:
        active = phase.state is State.ACTIVE
        style = "" if active else "dim"
        bar: RenderableType = Text()
        if active and phase.total_steps:
            bar = ProgressBar(
                total=phase.total_steps, completed=phase.step, style="bright_black", complete_style="cyan"
            )
        elif phase.held_out:
            bar = Text(f"held out {_show('accuracy', phase.held_out[-1])}", style=style)
        table.add_row(
            Text(phase.state.value, style=MARK_STYLES[phase.state]),
            Text(phase.name, style="bold" if active else style),
            bar,
            Text(_count(phase), style=style),
            Text(_time_left(phase, now), style=style),
        )
    return table


def _curve_table(phase: Phase) -> Table:
    from rich.table import Table
    from rich.text import Text

    held_out = " → ".join(_show("accuracy", value) for value in (phase.held_out[:1] + phase.held_out[1:][-1:]))
    rows = (
        (phase.objective, METRICS[phase.objective].unit, None),
        ("accuracy", f"held out {held_out or DASH}", 1.0),
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=len("reverse KL"))
    table.add_column(min_width=len("100.0%"), justify="right")
    table.add_column(width=SPARK_WIDTH, no_wrap=True, overflow="crop")
    table.add_column(no_wrap=True)
    for name, remark, top in rows:
        table.add_row(
            Text(LABELS[name], style="dim"),
            Text(_show(name, number(phase.latest, name)), style="bold"),
            Text(sparkline(phase.curves[name], width=SPARK_WIDTH, top=top), style="cyan"),
            Text(remark, style="dim"),
        )
    return table


def sparkline(values: Sequence[float], *, width: int, top: float | None) -> str:
    """At most `width` blocks from 0 to `top` (None: the largest value), each the mean of its share of the values."""
    if not values:
        return ""
    num_cells = min(width, len(values))
    bounds = [index * len(values) // num_cells for index in range(num_cells + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(bounds)]
    ceiling = top or max(means)
    heights = [mean / ceiling if ceiling > 0 else 0.0 for mean in means]
    return "".join(BLOCKS[min(max(int(height * len(BLOCKS)), 0), len(BLOCKS) - 1)] for height in heights)


def _step_line(phase: Phase, now: float) -> str:
    latest = phase.latest
    fields = (
        f"step {_count(phase):>9}",
        f"{LABELS[phase.objective]:>10} {_show(phase.objective, number(latest, phase.objective)):>6}",
        f"accuracy {_show('accuracy', number(latest, 'accuracy')):>6}",
        f"tokens/s {_show('tokens_per_second', number(latest, 'tokens_per_second')):>7}",
        f"staleness {_show('staleness_mean', number(latest, 'staleness_mean')):>4}",
        f"queue {_show('queue', number(latest, 'queue')):>3}",
        _time_left(phase, now),
    )
    return "  ".join(fields).rstrip()


def _speed_line(latest: Mapping[str, Any]) -> str:
    shown = {
        "tokens/s": "tokens_per_second",
        "staleness": "staleness_mean",
        "queue": "queue",
        "trained": "tokens_trained",
    }
    return "   ".join(f"{label} {_show(name, number(latest, name))}" for label, name in shown.items())


def _show(name: str, value: float | None) -> str:
    return METRICS[name].show(value, missing=DASH)


def _count(phase: Phase) -> str:
    if phase.state is State.WAITING or (phase.step == 0 and phase.total_steps is None):
        return ""
    return f"{phase.step}" if phase.total_steps is None else f"{phase.step}/{phase.total_steps}"


def _time_left(phase: Phase, now: float) -> str:
    """Of an active phase the time to go, of a finished one the time it took."""
    if phase.state is State.ACTIVE:
        eta_s = phase.eta_s(now)
        return "" if eta_s is None else f"{_clock_text(eta_s)} left"
    seconds = phase.seconds(now)
    return "" if seconds is None else _clock_text(seconds)


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
