"""Spans on disk: who did what when, whole lines only, whatever happened to the process that wrote them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from potstill.spans import Spans, read_spans

WRITES_AND_HANGS = """
import sys, time
from pathlib import Path
from potstill.spans import Spans
spans = Spans(Path(sys.argv[1]) / "spans" / "worker-0.jsonl", "worker-0")
for chunk in range(3):
    with spans.span("generate", chunk=chunk):
        pass
print("written", flush=True)
with spans.span("generate", chunk=3):
    time.sleep(60)
"""


def spans_in(folder: Path, process: str) -> Spans:
    return Spans(folder / "spans" / f"{process}.jsonl", process)


def test_a_span_says_who_did_what_when_and_of_what(tmp_path: Path):
    spans = spans_in(tmp_path, "worker-3")
    before = time.time()
    with spans.span("generate", chunk=7, version=2):
        time.sleep(0.02)
    after = time.time()
    (span,) = read_spans(tmp_path)
    assert (span.process, span.name, span.chunk, span.version, span.step) == ("worker-3", "generate", 7, 2, None)
    assert before - 0.005 <= span.start < span.end <= after + 0.005
    assert span.end - span.start >= 0.02


def test_a_span_ends_when_its_work_fails(tmp_path: Path):
    spans = spans_in(tmp_path, "learner-0")
    with pytest.raises(ZeroDivisionError), spans.span("train", step=1):
        _ = 1 / 0
    assert [span.name for span in read_spans(tmp_path)] == ["train"]


def test_without_a_path_nothing_is_left_and_nobody_has_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    spans = Spans(None, "worker-0")
    with spans.span("generate"):
        pass
    spans.close()
    assert list(tmp_path.iterdir()) == []


def test_spans_of_all_processes_are_read_in_the_order_of_their_start(tmp_path: Path):
    first, second = spans_in(tmp_path, "worker-1"), spans_in(tmp_path, "worker-0")
    with first.span("generate"), second.span("generate"), first.span("score"):
        pass
    found = [(span.process, span.name) for span in read_spans(tmp_path)]
    assert found == [("worker-1", "generate"), ("worker-0", "generate"), ("worker-1", "score")]


def test_a_folder_without_spans_has_none(tmp_path: Path):
    assert read_spans(tmp_path) == []


def test_what_ended_before_a_kill_is_there(tmp_path: Path):
    command = [sys.executable, "-c", WRITES_AND_HANGS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert [span.chunk for span in read_spans(tmp_path)] == [0, 1, 2]


def test_who_replaces_a_process_continues_its_file_behind_a_torn_line(tmp_path: Path):
    spans = spans_in(tmp_path, "worker-0")
    with spans.span("generate", chunk=1):
        pass
    spans.close()
    with (tmp_path / "spans" / "worker-0.jsonl").open("a") as file:
        file.write('{"process":"worker-0","name":"gener')
    with spans_in(tmp_path, "worker-0").span("generate", chunk=2):
        pass
    assert [span.chunk for span in read_spans(tmp_path)] == [1, 2]


def test_threads_of_one_process_do_not_tear_each_others_lines(tmp_path: Path):
    spans = spans_in(tmp_path, "worker-0")

    def write(thread: int) -> None:
        for chunk in range(200):
            with spans.span("score", chunk=200 * thread + chunk):
                pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(span.chunk for span in read_spans(tmp_path) if span.chunk is not None) == list(range(800))
