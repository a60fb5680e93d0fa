"""Event files for TensorBoard, by its own record writer; neither TensorFlow nor torch is imported.

    <run>/tensorboard/events.out.tfevents.TIME.HOST.PID.N      one record a step, flushed at once

A file is only ever appended to. Going back to a checkpoint writes the start of a session at the step after it, from
which TensorBoard takes away what was written of that step and later ones, in whichever file.
TensorBoard keeps float32, and of texts under one tag at one step it shows the last.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from potstill.sinks.sink import Ending, Facts, Note, Rewind, SinkLost, Step

VERSION = "brain.Event:2"  # the first in which the start of a session undoes steps
_numbers = count()


class TensorBoard:
    """Writes below `<run>/<folder>`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self, facts: Facts) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = facts.folder / self._folder
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        with self._refusals():
            folder.mkdir(parents=True, exist_ok=True)
            first = not any(folder.iterdir())
            self._writer = RecordWriter((folder / name).open("xb"))
            self._write(time.time(), file_version=VERSION)
            if first:
                config = json.dumps(facts.config, indent=2)
                self._write(time.time(), step=0, summary=_text("config", f"```json\n{config}\n```"))

    def step(self, step: Step) -> None:
        with self._refusals():
            self._write(step.time, step=step.step, summary=_scalars(step.values))

    def note(self, note: Note) -> None:
        with self._refusals():
            self._write(note.time, step=note.step, summary=_text(f"{note.level}/{note.type}", note.message))

    def rewind(self, rewind: Rewind) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        with self._refusals():
            self._write(rewind.time, step=rewind.step + 1, session_log=SessionLog(status=SessionLog.START))

    def finish(self, ending: Ending) -> None:
        rows = [f"| {name} | {value:g} |" for name, value in ending.headline.items()]
        table = "\n".join([f"**{ending.status}** after step {ending.step}\n", "| | |", "|---|---|", *rows])
        with self._refusals():
            self._write(ending.time, step=ending.step, summary=_text("report", table))
            self._writer.close()

    def _write(self, wall_time: float, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=wall_time, **event).SerializeToString())
        self._writer.flush()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """After a record that is torn nothing more of a file is read: the next one goes into another file."""
        try:
            yield
        except OSError as error:
            if self._writer is not None:
                with contextlib.suppress(OSError):
                    self._writer.close()
            raise SinkLost(f"{self._folder} cannot be written: {error.strerror}") from error


def _scalars(values: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])


def _text(tag: str, markdown: str) -> Any:
    from tensorboard.plugins.text.summary_v2 import text_pb

    return text_pb(tag, markdown)
