"""What commands print: plain into a pipe, tables on a terminal, one line for a mistake, and no word to the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from potstill.client import Refused
from potstill.console import one_line_errors, pairs, show, show_table, visible
from potstill.errors import ConfigError, PotstillError, RunError, ServiceError, TeacherRefused
from tests.terminals import ROOT, on_a_terminal

HOSTILE = "\x1b[31mred\r\n\x07\x9b2J\u202eevil\u2028"
TABLE = f"from potstill.console import show_table; show_table(['RUN', 'NOTE'], [['a', {HOSTILE!r}], ['longer', '']])"


def test_control_characters_are_shown_and_not_sent():
    assert visible(HOSTILE) == "\\x1b[31mred\\r\\n\\x07\\x9b2J\\u202eevil\\u2028"
    assert visible("Größe – 日本 🙂") == "Größe – 日本 🙂"


def test_into_a_pipe_a_table_is_plain_columns(capsys: pytest.CaptureFixture[str]):
    show_table(["RUN", "STATUS"], [["a", "running"], ["longer-name", "failed"]])
    assert capsys.readouterr().out == "RUN          STATUS\na            running\nlonger-name  failed\n"
    show_table(["RUN", "STATUS"], [])
    assert capsys.readouterr().out == "RUN  STATUS\n"


def test_on_a_terminal_it_is_drawn_and_a_cell_is_still_only_text():
    code, painted = on_a_terminal([sys.executable, "-c", TABLE])
    assert code == 0
    assert "─" in painted
    assert "\\x1b[31mred" in painted
    assert "\x1b[31mred" not in painted
    assert "\x9b" not in painted


def test_lines_of_data_keep_their_ends_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    show("one\n\ttwo\x1b[2J\n")
    assert capsys.readouterr().out == "one\n\ttwo\\x1b[2J\n\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("optim.lr: too large\nname: missing"), 2, "optim.lr: too large; name: missing"),
        (RunError("it ended"), 1, "it ended"),
        (TeacherRefused("no"), 3, "no"),
        (ServiceError("nobody", None, "unreachable"), 4, "nobody (unreachable)"),
        (Refused("no such run", 404, "run_not_found", "abc"), 4, "no such run (run_not_found, request abc)"),
        (Refused("HTTP 502", 502, None, None), 4, "HTTP 502"),
        (Refused("\x1b[2J", 400, "x", None), 4, "\\x1b[2J (x)"),
        (FileNotFoundError(2, "No such file or directory", "gone.toml"), 2, "gone.toml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: PotstillError | OSError, code: int, line: str
):
    @one_line_errors
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as raised:
        command()
    assert raised.value.exit_code == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"potstill: {line}\n")


def test_our_own_mistakes_keep_their_traceback():
    @one_line_errors
    def command() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        command()


def test_pairs_are_read_or_refused():
    assert pairs(["a=1", "b=x=y", "c="], "--meta") == {"a": "1", "b": "x=y", "c": ""}
    assert pairs(None, "--meta") == {}
    for wrong in ("a", "=1", ""):
        with pytest.raises(ConfigError, match="name=value"):
            pairs([wrong], "--meta")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path):
    """`potstill methods --json | head -c 10`."""
    shell = f'"{sys.executable}" -m potstill methods --json | head -c 10'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (len(done.stdout), "Traceback" in done.stderr) == (10, False)
    assert json.loads('"' + done.stdout.splitlines()[0] + '"') == "{"
