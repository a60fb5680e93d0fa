"""Event files, read back as TensorBoard reads them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from potstill.journal import Journal, Status
from potstill.sinks.opening import ready
from potstill.sinks.sink import Rewind, SinkLost
from potstill.sinks.tensorboard import TensorBoard
from tests.sinks import ending, facts_of, make_config, step, tell


def read_events(folder: Path) -> EventAccumulator:
    """As TensorBoard reads it, and nothing thinned out."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return reader


def scalars(reader: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def text(reader: EventAccumulator, tag: str) -> str:
    (event,) = reader.Tensors(tag)
    return event.tensor_proto.string_val[0].decode()


def test_tensorboard_reads_what_a_run_has_told(tmp_path: Path):
    sinks = ready(make_config(tmp_path, tensorboard={}).sinks)

    def work(journal: Journal) -> None:
        journal.event("eval.finished", "half", stage="before", step=0, accuracy=0.5)
        journal.metrics(1, {"loss": 0.5, "accuracy": math.nan})
        journal.event("alarm.length", "answers grow", level="warn")
        journal.metrics(2, {"loss": 0.25, "accuracy": 0.75})
        journal.event("run.finished", "the run is complete", student_after=0.5)
        journal.status(Status.SUCCEEDED)

    folder = tell(tmp_path, sinks, work)
    reader = read_events(folder / "tensorboard")
    assert scalars(reader, "loss") == [(1, 0.5), (2, 0.25)]
    assert scalars(reader, "accuracy") == [(2, 0.75)]
    assert scalars(reader, "held_out_accuracy") == [(0, 0.5)]
    assert text(reader, "warn/alarm.length") == "answers grow"
    assert "**succeeded** after step 2" in text(reader, "report")
    assert "| student_after | 0.5 |" in text(reader, "report")
    assert '"method": "opd"' in text(reader, "config")


def test_tensorboard_shows_a_step_that_was_done_again_as_it_was_last(tmp_path: Path):
    first = TensorBoard("tensorboard")
    first.open(facts_of(tmp_path))
    for number in (1, 2, 3, 4):
        first.step(step(number, loss=float(number)))
    first.rewind(Rewind(step=2, time=1010.0))
    first.step(step(3, loss=30.0))
    second = TensorBoard("tensorboard")  # the process was killed, and the run resumed
    second.open(facts_of(tmp_path, resumed=True))
    second.rewind(Rewind(step=2, time=1020.0))
    second.step(step(3, loss=300.0))
    second.finish(ending())
    reader = read_events(tmp_path / "tensorboard")
    assert scalars(reader, "loss") == [(1, 1.0), (2, 2.0), (3, 300.0)]
    assert text(reader, "config").startswith("```json")


def test_tensorboard_goes_on_in_another_file_when_one_cannot_be_written(tmp_path: Path):
    sink = TensorBoard("tensorboard")
    (tmp_path / "tensorboard").write_text("a file is in the way")
    with pytest.raises(SinkLost, match="tensorboard cannot be written: File exists"):
        sink.open(facts_of(tmp_path))
    (tmp_path / "tensorboard").unlink()
    sink.open(facts_of(tmp_path))
    sink.step(step(1, loss=1.0))
    assert scalars(read_events(tmp_path / "tensorboard"), "loss") == [(1, 1.0)]


def test_writing_for_tensorboard_imports_neither_tensorflow_nor_torch(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path\n"
        "from potstill.sinks.sink import *; from potstill.sinks.tensorboard import TensorBoard\n"
        "sink = TensorBoard('t'); sink.open(Facts(name='n', folder=Path(sys.argv[1]), config={}, resumed=False))\n"
        "sink.step(Step(step=1, time=0.0, values={'loss': 1.0}))\n"
        "sink.note(Note(step=1, time=0.0, level='warn', type='a', message='b'))\n"
        "print({'torch', 'tensorflow'} & set(sys.modules))"
    )
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise AssertionError('nobody asked for it')")
    there = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=there)
    assert done.stdout == "set()\n"
