"""What a person sees of a run: every phase with its state, honest numbers, and never a word that stops the run."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

from potstill.display import LiveDisplay, PlainDisplay, make_display, sparkline
from potstill.journal import Journal
from potstill.progress import Progress, State, printable

STEP = {"reverse_kl": 0.213, "accuracy": 0.612, "tokens_per_second": 5120.0, "staleness_mean": 0.4, "queue": 3}


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


class ClosedPipe(io.StringIO):
    """Standard output whose reader went away after `lines` writes."""

    def __init__(self, lines):
        super().__init__()
        self.left = lines

    def write(self, text):
        if self.left == 0:
            raise BrokenPipeError
        self.left -= 1
        return super().write(text)


def plain(total_steps=3, phases=None):
    out, clock = io.StringIO(), Clock()
    return make_display(total_steps, "a run", file=out, phases=phases, clock=clock), out, clock


def event(type, message="", level="info", **data):
    return {"type": type, "level": level, "message": message, "data": data}


def lines_of(out):
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def panel_of(display, width=80):
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(display.panel())
    return out.getvalue()


def live(total_steps=10, phases=None):
    clock = Clock()
    return make_display(total_steps, "a run", file=Terminal(), phases=phases, clock=clock), clock


def test_a_pipe_gets_plain_lines_and_a_terminal_a_panel():
    assert isinstance(plain()[0], PlainDisplay)
    assert isinstance(live()[0], LiveDisplay)


def test_every_step_of_a_slow_run_is_one_line():
    display, out, clock = plain()
    with display:
        for step in (1, 2, 3):
            clock.now += 5
            display("metrics", {"step": step, **STEP})
    step_lines = [line for line in lines_of(out) if " step " in line]
    assert step_lines[1] == (
        "0:10 training step 2/3 reverse KL 0.213 accuracy 61.2% tokens/s 5,120 staleness 0.4 queue 3 0:05 left"
    )
    assert len(step_lines) == 3


def test_a_fast_run_is_not_a_flood_and_its_last_step_is_written():
    display, out, clock = plain(total_steps=None)
    with display:
        for step in range(1, 1001):
            clock.now += 0.01
            display("metrics", {"step": step, **STEP})
    step_lines = [line for line in lines_of(out) if " step " in line]
    assert 5 <= len(step_lines) <= 7
    assert " step 1000 " in step_lines[-1]


def test_lines_of_steps_are_aligned_whatever_is_missing():
    display, out, clock = plain(total_steps=120)
    for step, values in ((1, STEP), (2, {}), (120, dict.fromkeys(STEP))):
        clock.now += 5
        display("metrics", {"step": step, **values})
    step_lines = [line for line in out.getvalue().splitlines() if " step " in line]
    assert len({line.index("accuracy") for line in step_lines}) == 1
    assert len({line.index("queue") for line in step_lines}) == 1


def test_a_missing_number_is_a_dash_and_never_zero():
    display, out, _ = plain()
    display("metrics", {"step": 1, "reverse_kl": None, "accuracy": float("nan")})
    assert lines_of(out)[-1] == "0:00 training step 1/3 reverse KL – accuracy – tokens/s – staleness – queue –"


def test_evaluations_warnings_and_failures_are_lines_of_their_own():
    display, out, _ = plain()
    display("event", event("eval.finished", stage="before", accuracy=0.125))
    display("event", event("weights.published", "version 1"))
    display("event", event("teacher.slow", "the teacher is slow", level="warn"))
    display("event", event("run.failed", "loss is NaN", level="error"))
    text = out.getvalue()
    assert "held-out accuracy 12.5%, before" in text
    assert "the teacher is slow" in text
    assert "loss is NaN" in text
    assert "version 1" not in text


def test_phases_follow_each_other_by_events_alone():
    display, out, clock = plain(total_steps=None, phases={"warming": 2, "distilling": 4})
    with display:
        display("event", event("phase.started", phase="warming"))
        display("metrics", {"step": 1, "loss": 1.5})
        clock.now += 7
        display("event", event("phase.started", phase="distilling"))
        assert [phase.state for phase in display.progress.phases] == [State.DONE, State.ACTIVE]
        assert display.progress.phases[0].seconds(clock.now + 99) == 7
    assert [phase.state for phase in display.progress.phases] == [State.DONE, State.DONE]
    assert [line for line in lines_of(out) if line.endswith("begins")] == [
        "0:00 warming begins",
        "0:07 distilling begins",
    ]
    assert "0:00 warming step 1/2 loss 1.5000" in out.getvalue().replace("  ", " ").replace("  ", " ").replace(
        "  ", " "
    )


def test_what_a_phase_does_inside_is_no_phase_of_its_own():
    display, _ = live(phases={"warming": 2, "distilling": 4})
    display.begin("warming")
    display("event", event("phase.started", phase="evaluating"))
    assert [phase.name for phase in display.progress.phases] == ["warming", "distilling"]
    assert display.progress.phases[0].state is State.ACTIVE
    assert "evaluating" in panel_of(display)


def test_an_exception_marks_the_active_phase_as_failed_and_passes():
    display, _, _ = plain(phases={"warming": 2, "distilling": 4})
    display.begin("warming")
    with pytest.raises(KeyboardInterrupt), display:
        raise KeyboardInterrupt
    assert [phase.state for phase in display.progress.phases] == [State.FAILED, State.WAITING]


def test_the_time_left_follows_the_pace_of_the_last_steps():
    progress = Progress(100, {})
    for step in range(1, 31):
        progress.take_metrics({"step": step}, now=10.0 if step == 1 else 1000.0 + 2 * step)
    phase = progress.shown
    assert phase.eta_s(now=1060.0) == 70 * 2
    assert phase.eta_s(now=1063.0) == 70 * 2 - 3
    assert phase.eta_s(now=9999.0) == 0


def test_the_time_left_is_unknown_before_there_is_a_pace():
    progress = Progress(100, {})
    progress.take_metrics({"step": 1}, now=1.0)
    assert progress.shown.eta_s(now=2.0) is None


def test_the_panel_lists_the_phases_with_state_time_and_numbers():
    display, clock = live(total_steps=None, phases={"warming": 2, "distilling": 4, "sft control": 120})
    display.begin("warming")
    display("metrics", {"step": 2, "loss": 1.0})
    clock.now += 41
    display.begin("distilling")
    for step in (1, 2):
        clock.now += 10
        display("metrics", {"step": step, **STEP})
    display("event", event("eval.finished", stage="before", accuracy=0.125))
    display("event", event("eval.finished", stage="after", accuracy=0.5))
    rows = [" ".join(line.strip("│╭╮╰╯─ \n").split()) for line in panel_of(display).splitlines()]
    assert "✓ warming 2/2 0:41" in rows
    assert any(row.startswith("● distilling ━") and row.endswith("2/4 0:20 left") for row in rows)
    assert "○ sft control" in rows
    assert "reverse KL 0.213 ██ nats/token" in rows
    assert "accuracy 61.2% ▅▅ held out 12.5% → 50.0%" in rows
    assert "tokens/s 5,120 staleness 0.4 queue 3 trained –" in rows


def test_the_panel_keeps_its_height_and_fits_80_columns():
    display, clock = live(phases={"a phase": 10, "another phase": 10})
    heights = {panel_of(display).count("\n")}
    display.begin("a phase")
    heights.add(panel_of(display).count("\n"))
    for step in range(1, 300):
        clock.now += 1
        display("metrics", {"step": step, **STEP, "tokens_trained": 10**9})
    display("event", event("checkpoint.saved", "a long message " * 20))
    picture = panel_of(display)
    heights.add(picture.count("\n"))
    assert len(heights) == 1
    assert max(len(line) for line in picture.splitlines()) == 80


def test_markup_and_escape_codes_in_a_record_are_shown_as_text():
    display, _ = live()
    display("event", event("warned", "[bold]not bold[/] \x1b[2J\nsecond line", level="warn"))
    picture = panel_of(display)
    assert "[bold]not bold[/]" in picture
    assert "\x1b" not in picture


def test_a_record_with_nothing_in_it_is_shown_too():
    for display in (plain()[0], live()[0]):
        with display:
            for stream in ("event", "metrics", "status", "unheard of"):
                display(stream, {})
            display("event", event("phase.started"))
            display("event", event("eval.finished", accuracy=None))
        assert (display.progress.shown.step, display.progress.shown.held_out) == (0, [])


@pytest.mark.parametrize("num_lines", [0, 1, 4])
def test_a_closed_output_ends_the_display_and_not_the_run(num_lines):
    out = ClosedPipe(num_lines)
    with make_display(50, "a run", file=out, clock=Clock()) as display:
        for step in range(1, 51):
            display("event", event("run.warned", f"warning {step}", level="warn"))
            display("metrics", {"step": step, **STEP})
    assert len(out.getvalue().splitlines()) <= num_lines


def test_a_closed_file_and_a_terminal_that_hung_up_end_the_display_too():
    class HungUp(Terminal):
        def write(self, text):
            raise OSError(5, "Input/output error")

    closed = io.StringIO()
    closed.close()
    for file in (closed, HungUp()):
        with make_display(2, "a run", file=file, clock=Clock()) as display:
            display("metrics", {"step": 1, **STEP})
        assert display.progress.shown.state is State.DONE


def test_a_terminal_without_the_characters_gets_question_marks():
    raw = io.BytesIO()
    with make_display(2, "a run", file=io.TextIOWrapper(raw, encoding="ascii"), clock=Clock()) as display:
        display("metrics", {"step": 1})
        assert b"accuracy      ?" in raw.getvalue()


def test_a_run_piped_into_head_ends_well():
    program = """
import sys
from potstill.display import make_display
with make_display(None, "a run", file=sys.stdout) as display:
    for step in range(2000):
        display("event", {"type": "x", "level": "warn", "message": "x" * 100, "data": {}})
print("the run went on", file=sys.stderr)
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.stdout.close()
    errors = run.stderr.read()
    run.stderr.close()
    assert (run.wait(timeout=30), errors) == (0, "the run went on\n")


def test_no_color_is_honoured_on_a_terminal():
    program = """
import io, sys
from potstill.display import make_display
class Terminal(io.StringIO):
    def isatty(self): return True
out = Terminal()
with make_display(3, "a run", file=out) as display:
    display("metrics", {"step": 1, "reverse_kl": 0.5, "accuracy": 0.5})
print(repr(out.getvalue()))
"""
    plain_environment = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    colours = {}
    for name, extra in (("with", {}), ("without", {"NO_COLOR": "1"})):
        environment = {**plain_environment, "TERM": "xterm-256color", **extra}
        written = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        colours[name] = len(re.findall(r"\\x1b\[[0-9;]*3[0-9][0-9;]*m", written.stdout))
    assert colours["with"] > 0
    assert colours["without"] == 0


def test_a_dumb_terminal_gets_lines():
    program = """
import io
from potstill.display import make_display
class Terminal(io.StringIO):
    def isatty(self): return True
print(type(make_display(3, "a run", file=Terminal())).__name__)
"""
    written = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TERM": "dumb"}, capture_output=True, text=True, check=True
    )
    assert written.stdout == "PlainDisplay\n"


def test_rich_is_not_imported_for_plain_lines():
    program = "import io, sys; from potstill.display import make_display; make_display(1, 'a', file=io.StringIO());"
    program += "print('rich' in sys.modules)"
    written = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert written.stdout == "False\n"


def test_a_journal_tells_the_display(tmp_path):
    display, out, _ = plain()
    journal = Journal(tmp_path / "run")
    journal.listen(display)
    journal.event("phase.started", "distilling", phase="distilling")
    journal.metrics(1, STEP)
    journal.close()
    assert any(line.startswith("0:00 distilling step 1/3 reverse KL 0.213") for line in lines_of(out))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["step"] == 1


@pytest.mark.parametrize(
    ("values", "top", "picture"),
    [
        ([], None, ""),
        ([0.0, 0.0], None, "▁▁"),
        ([0.5], 1.0, "▅"),
        ([1.0, 0.5, 0.0], None, "█▅▁"),
        ([0.0, 0.2, 0.8, 1.0], 1.0, "▁▂▇█"),
        ([-1.0, 2.0], 1.0, "▁█"),
    ],
)
def test_a_sparkline_rises_from_zero(values, top, picture):
    assert sparkline(values, width=8, top=top) == picture


def test_a_long_curve_is_averaged_into_the_width_with_every_value_used_once():
    values = [0.0] * 50 + [1.0] * 50
    assert sparkline(values, width=4, top=1.0) == "▁▁██"
    assert len(sparkline(list(range(1, 1001)), width=24, top=None)) == 24


def test_control_characters_become_spaces():
    assert printable("a\x1b[2Jb\nc") == "a [2Jb c"
    assert printable(None) == ""
