"""One range of bytes or a refusal; never a byte that was not asked for."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.service import ranges as documented
from orchestrator.service.ranges import Unsatisfiable, part

GOOD = {
    None: (0, 10, False),
    "items=0-1": (0, 10, False),
    "bytes": (0, 10, False),
    "": (0, 10, False),
    "bytes=0-0": (0, 1, True),
    "bytes=2-5": (2, 6, True),
    "bytes=2-": (2, 10, True),
    "bytes=9-": (9, 10, True),
    "bytes=-3": (7, 10, True),
    "bytes=-99": (0, 10, True),
    "bytes=0-99": (0, 10, True),
    "BYTES= 1-2 ": (1, 3, True),
}
BAD = [
    "bytes=10-",
    "bytes=5-2",
    "bytes=-0",
    "bytes=-",
    "bytes=",
    "bytes=a-b",
    "bytes=1-2-3",
    "bytes=--1",
    "bytes=+1-2",
    "bytes=٣-٤",
    "bytes=0x1-2",
    "bytes=0-1,2-3",
    "bytes=0-1," * 5000,
    "bytes=" + "9" * 5000 + "-",
]


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(documented).failed == 0


@pytest.mark.parametrize("header", GOOD)
def test_a_range_that_can_be_had_is_had(header: str | None):
    found = part(header, 10)
    assert (found.start, found.stop, found.partial) == GOOD[header]
    assert found.headers["Content-Length"] == str(found.stop - found.start)
    assert ("Content-Range" in found.headers) is found.partial


@pytest.mark.parametrize("header", BAD, ids=lambda header: header[:24])
def test_what_is_no_single_range_of_bytes_is_416_with_the_size(header: str):
    with pytest.raises(Unsatisfiable) as caught:
        part(header, 10)
    assert (caught.value.status, caught.value.headers) == (416, {"Content-Range": "bytes */10"})


def test_nothing_of_an_empty_file_can_be_asked_for():
    assert part(None, 0).headers["Content-Length"] == "0"
    for header in ("bytes=0-", "bytes=-1", "bytes=0-0"):
        with pytest.raises(Unsatisfiable):
            part(header, 0)


@given(st.text(max_size=60), st.integers(0, 1000))
def test_whatever_a_header_says_the_part_lies_within_the_file(text: str, size: int):
    for header in (text, f"bytes={text}"):
        try:
            found = part(header, size)
        except Unsatisfiable:
            continue
        assert 0 <= found.start <= found.stop <= size
