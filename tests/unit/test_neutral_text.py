"""Text of processes can steer no terminal, and every byte of it stays in its place."""

from __future__ import annotations

import doctest
import io
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.service import neutral as documented
from orchestrator.service.neutral import neutral, unfinished
from orchestrator.service.ranges import Part
from orchestrator.service.run_logs import last_lines, neutral_pieces, since

ATTACKS = {
    b"\x1b[2J\x1b[31mred": b"?[2J?[31mred",
    b"\x1b]0;title\x07": b"?]0;title?",
    "\x9b31m".encode(): b"??31m",
    b"\x9b31m": b"?31m",
    "a\u202eb\u2066c".encode(): b"a???b???c",
    "line\u2028forged".encode(): b"line???forged",
    "\U000e0041".encode(): b"????",
    b"10%\r20%\r\n": b"10%\n20% \n",
    b"\x00\x08\x7f": b"???",
    b"\xed\xa0\x80": b"???",  # half of a surrogate pair
    b"\xc0\xaf": b"??",  # a slash, too long
    "tab\tand\nemoji 👩‍🚀 日本語".encode(): "tab\tand\nemoji 👩‍🚀 日本語".encode(),
}
CHARACTERS = st.one_of(st.binary(max_size=3), st.text(max_size=3).map(lambda text: text.encode("utf-8", "replace")))
TEXTS = st.lists(CHARACTERS, max_size=40).map(b"".join)


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(documented).failed == 0


@pytest.mark.parametrize("text", ATTACKS, ids=repr)
def test_what_would_steer_a_terminal_is_shown_as_question_marks(text: bytes):
    assert neutral(text) == ATTACKS[text]


@settings(max_examples=300)
@given(TEXTS)
def test_the_text_is_harmless_and_as_long_as_it_was(text: bytes):
    found = neutral(text)
    assert len(found) == len(text)
    assert neutral(found) == found
    assert not [c for c in found.decode() if unicodedata.category(c) in {"Cc", "Zl", "Zp"} and c not in "\n\t"]


@settings(max_examples=300)
@given(TEXTS, st.integers(0, 120), st.integers(0, 120))
def test_a_piece_of_a_log_reads_the_same_wherever_it_is_cut(text: bytes, first: int, second: int):
    start, stop = sorted((min(first, len(text)), min(second, len(text))))
    wanted = Part(start=start, stop=stop, size=len(text), partial=True)
    found = b"".join(neutral_pieces(io.BufferedReader(io.BytesIO(text)), wanted))  # type: ignore[arg-type]
    assert found == neutral(text)[start:stop]


def test_a_long_log_is_handed_out_in_pieces_that_join(tmp_path: Path):
    text = ("é\x1b日👩‍🚀\r\n" * 30_000).encode()
    (tmp_path / "log").write_bytes(text)
    for start in (0, 1, 65_535, 65_537):
        wanted = Part(start=start, stop=len(text), size=len(text), partial=False)
        pieces = list(neutral_pieces((tmp_path / "log").open("rb"), wanted))
        assert max(map(len, pieces)) <= 65_536
        assert b"".join(pieces) == neutral(text)[start:]


@pytest.mark.parametrize("text", ["é", "日", "🚀", "a"])
def test_a_character_that_is_still_being_written_is_waited_for(text: str, tmp_path: Path):
    whole = text.encode()
    for written in range(len(whole) + 1):
        assert unfinished(b"before " + whole[:written]) == (0 if written == len(whole) else written)
        (tmp_path / "log").write_bytes(b"before " + whole[:written])
        with (tmp_path / "log").open("rb") as file:
            assert since(file, 0).stop == 7 + (written if written == len(whole) else 0)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["", "a", "bb", "日本"]), max_size=12), st.booleans(), st.integers(1, 14))
def test_the_last_lines_are_the_last_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ended: bool, count: int
):
    text = "\n".join(lines) + ("\n" if ended and lines else "")
    with file_of(tmp_path_factory.getbasetemp(), text) as file:
        found = last_lines(file, count)
    assert text.encode()[found.start : found.stop].decode().splitlines() == text.splitlines()[-count:]


def test_the_last_lines_of_a_log_without_lines_are_bounded(tmp_path: Path):
    file = file_of(tmp_path, "日" * 3_000_000)
    found = last_lines(file, 5)
    assert found.stop - found.start <= 4 << 20
    assert re.fullmatch("日+", b"".join(neutral_pieces(file, found)).decode())


def file_of(folder: Path, text: str) -> io.BufferedReader:
    (folder / "log").write_bytes(text.encode())
    return (folder / "log").open("rb")
