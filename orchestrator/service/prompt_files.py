"""Uploaded prompts, read line by line as a run will read them, and made into what it reads where they are not that.

    prompts, eval   JSON Lines of prompts                        a run reads the file itself
    fine-tune       JSON Lines of prompts, or of conversations   a run reads what is written beside it

A conversation is `messages`; what the assistant said last becomes the solution. Refuses a file with a line that the run
would refuse, telling which, with no more than a line of it in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from potstill.environments import read_row
from potstill.errors import ConfigError, ServiceError

Purpose = Literal["prompts", "eval", "fine-tune"]

MOST_LINE_BYTES = 8 * 2**20
MOST_ROWS = 2_000_000
_MOST_TOLD = 20
_MOST_COLUMNS = 100


@dataclass(slots=True, kw_only=True)
class Summary:
    """What was read."""

    rows: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    refused: int = 0
    told: list[str] = field(default_factory=list)

    def refuse(self, line: int, why: str) -> None:
        self.refused += 1
        if len(self.told) < _MOST_TOLD:
            self.told.append(f"line {line}: {why}")


def read(path: Path, purpose: Purpose, *, beside: Path) -> Summary:
    """Read all of the file. For fine-tuning, what the run reads is written to the new file `beside`.

    Raises ServiceError (400, invalid_file) that lists the first lines that are wrong, and says how many there are.
    """
    summary = Summary()
    with path.open("rb") as file:
        if purpose == "fine-tune":
            with beside.open("xb") as converted:
                _read(file, summary, converted)
        else:
            _read(file, summary, None)
    if summary.refused:
        count = f"{summary.refused} of {summary.rows + summary.refused} lines cannot be used"
        more = [f"(and {summary.refused - _MOST_TOLD} more)"] if summary.refused > _MOST_TOLD else []
        raise _invalid("\n".join([f"{count}:", *summary.told, *more]))
    if not summary.rows:
        raise _invalid("the file has no line that is not empty")
    return summary


def _read(file: BinaryIO, summary: Summary, converted: BinaryIO | None) -> None:
    for number, line in _lines(file):
        try:
            row = read_row(_as_prompt(line)) if converted is not None else read_row(line)
        except ConfigError as error:
            summary.refuse(number, str(error))
            continue
        summary.rows += 1
        if summary.rows > MOST_ROWS:
            raise _invalid(f"the file has more than {MOST_ROWS} rows")
        if len(summary.columns) < _MOST_COLUMNS:
            summary.columns |= dict.fromkeys(name[:100] for name in list(row)[:_MOST_COLUMNS])
        if converted is not None:
            converted.write(json.dumps(row).encode() + b"\n")


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, from 1. Raises ServiceError for what is no text, or has too long a line."""
    number = 0
    while line := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        if len(line) > MOST_LINE_BYTES:
            raise _invalid(f"line {number}: longer than {MOST_LINE_BYTES} bytes")
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise _invalid(f"line {number}: not UTF-8") from None
        if text.strip():
            yield number, text


def _as_prompt(line: str) -> str:
    """A conversation as a prompt and its solution; any other line as it is."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return line
    messages = row.get("messages") if isinstance(row, dict) else None
    if "prompt" in (row if isinstance(row, dict) else {}) or not isinstance(messages, list) or not messages:
        return line
    rest = {name: value for name, value in row.items() if name != "messages"}
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") == "assistant":
        return json.dumps({"prompt": messages[:-1], "solution": last.get("content"), **rest})
    return json.dumps({"prompt": messages, **rest})


def _invalid(message: str) -> ServiceError:
    return ServiceError(message, 400, "invalid_file")
