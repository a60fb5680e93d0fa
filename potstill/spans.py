"""What a process of a run did, and when: spans, named after what is worked at or waited for.

    <run>/spans/loop.jsonl  learner-0.jsonl  worker-3.jsonl  teacher.jsonl      a file a process, a line a span

    {"process":"worker-3","name":"generate","start":1764012345.123456,"end":1764012349.871234,"chunk":7}

    generate  score  train  evaluate  checkpoint            work
    weights:publish  weights:load  weights:pause            work for a version; in a pause, generation stands still
    wait:batch  wait:chunk  wait:grant                      for what the workers write, for one of them, for the learner

Times are seconds since 1970. Inside a process they come from one clock that never jumps; between hosts they agree as
well as the hosts' clocks do. A span is written when it ends, also by an exception; what a killed process was at is not
there. It measures nothing of its own accord, decides nothing, and sends nothing anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from potstill.refusals import refusals

FOLDER = "spans"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of one process's time. The numbers say of which step, chunk, version or worker, where it is of one."""

    process: str
    name: str
    start: float
    end: float
    step: int | None = None
    chunk: int | None = None
    version: int | None = None
    worker: int | None = None


class Spans:
    """One process's recorder. With no path it does the same and leaves nothing, so that who measures need not ask.

        spans = Spans(run / "spans" / "worker-3.jsonl", "worker-3")
        with spans.span("generate", chunk=7):
            ...

    Spans may overlap and end in any thread: each is one write, out of this process when the block is left. A process
    that replaces another continues its file.
    """

    def __init__(self, path: Path | None, process: str) -> None:
        self._path = path or Path(os.devnull)
        self._process = process
        self._epoch = time.time() - time.perf_counter()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115  open as long as the process is
        _end_torn_line(self._file)

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        *,
        step: int | None = None,
        chunk: int | None = None,
        version: int | None = None,
        worker: int | None = None,
    ) -> Iterator[None]:
        """Record how long the block takes, and of what it is. Raises RunError when the disk is full."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            of = {"step": step, "chunk": chunk, "version": version, "worker": worker}
            self._write(name, start, end, {key: number for key, number in of.items() if number is not None})

    def close(self) -> None:
        self._file.close()

    def _write(self, name: str, start: float, end: float, of: Mapping[str, int]) -> None:
        times = {"start": round(self._epoch + start, 6), "end": round(self._epoch + end, 6)}
        with refusals(self._path):
            self._file.write(_encode({"process": self._process, "name": name, **times, **of}).encode() + b"\n")


def read_spans(folder: Path) -> list[Span]:
    """Every span of the run in `folder`, by start. A line that was torn by a kill or a full disk is left out."""
    found = [span for path in sorted((folder / FOLDER).glob("*.jsonl")) for span in _spans_of(path)]
    return sorted(found, key=lambda span: span.start)


def _spans_of(path: Path) -> Iterator[Span]:
    with path.open() as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield Span(**json.loads(line))


def _end_torn_line(file: FileIO) -> None:
    """What follows a torn line shall begin a line of its own."""
    if file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


_encode = json.JSONEncoder(separators=(",", ":")).encode
