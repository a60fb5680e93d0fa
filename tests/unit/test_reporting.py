"""How a run's logs are read and sent: whole lines only, from the last acknowledged one, and never in the run's way."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.reporting import MAX_RECORDS, HttpReporter, Tail, logs_in, status_in
from potstill.errors import NonFinite
from potstill.journal import Journal, Status


def written(folder: Path, *, events: int, status: Status | None = None) -> Path:
    journal = Journal(folder)
    for number in range(1, events + 1):
        journal.event("t", f"m{number}")
        journal.metrics(number, {"loss": float("nan")})
    if status is not None:
        journal.status(status, error=NonFinite("loss") if status is Status.FAILED else None)
    journal.close()
    return folder


def seqs(records: list[dict]) -> list[int]:
    return [record["seq"] for record in records]


def test_a_tail_reads_the_same_until_it_is_acknowledged_and_again_when_asked(tmp_path: Path):
    tail = Tail(written(tmp_path / "run", events=5) / "events.jsonl")
    assert seqs(tail.read()) == seqs(tail.read()) == [1, 2, 3, 4, 5]
    tail.acknowledge(3)
    assert seqs(tail.read()) == [4, 5]
    tail.acknowledge(5)
    assert tail.read() == []
    tail.acknowledge(1)
    assert seqs(tail.read()) == [2, 3, 4, 5]


def test_a_torn_line_is_read_once_it_is_whole(tmp_path: Path):
    log = tmp_path / "events.jsonl"
    log.write_text('{"seq":1}\n{"se')
    tail = Tail(log)
    assert seqs(tail.read()) == [1]
    with log.open("a") as file:
        file.write('q":2}\n')
    assert seqs(tail.read()) == [1, 2]


def test_a_missing_log_is_empty_and_a_long_one_comes_in_pieces(tmp_path: Path):
    missing = Tail(tmp_path / "events.jsonl")
    assert (missing.read(), missing.drained) == ([], True)
    tail = Tail(written(tmp_path / "run", events=MAX_RECORDS + 1) / "events.jsonl")
    assert (len(tail.read()), tail.drained) == (MAX_RECORDS, False)
    tail.acknowledge(MAX_RECORDS)
    assert (seqs(tail.read()), tail.drained) == ([MAX_RECORDS + 1], True)


def test_a_folder_tells_what_is_not_held_yet_and_how_the_run_ended(tmp_path: Path):
    folder = written(tmp_path / "run", events=MAX_RECORDS + 5, status=Status.FAILED)
    reports = list(logs_in(folder, {"events": 3, "metrics": 0}))
    assert [event.seq for report in reports for event in report.events] == list(range(4, MAX_RECORDS + 6))
    assert [record.seq for report in reports for record in report.metrics] == list(range(1, MAX_RECORDS + 6))
    (last,) = status_in(folder)
    (status,) = last.statuses
    assert (status.status, status.error.category if status.error else None) == (Status.FAILED, "system")


def test_a_service_that_is_away_costs_the_run_nothing(tmp_path: Path):
    journal = Journal(tmp_path / "run")
    reporter = HttpReporter("http://127.0.0.1:1", "run", "token", journal.folder)
    journal.listen(reporter)
    start = time.monotonic()
    for number in range(500):
        journal.event("t", f"m{number}")
    journal.status(Status.SUCCEEDED)
    assert time.monotonic() - start < 2.0
    start = time.monotonic()
    assert reporter.close(0.3) is False
    assert time.monotonic() - start < 2.0
    journal.close()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("orchestrator.reporting", "fastapi torch ray sqlalchemy"),
        ("potstill.service_cli", "fastapi torch ray httpx2 rich sqlalchemy"),
        ("potstill.client", "fastapi torch ray"),
    ],
)
def test_what_is_imported_early_brings_nothing_heavy(module: str, forbidden: str):
    code = f"import sys, {module}; print(*sorted(set('{forbidden}'.split()) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
