"""What each fault does to a run, the short version: one run that is hurt by and by, and what its folder promises.

The long version, with frozen processes, cut networks and full disks, is `make chaos`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from potstill.errors import RunError
from potstill.journal import Journal, Status, read_jsonl
from tests.disks import files_of_at_most, flip_a_bit
from tests.disturbance import disturbed, furnish

STEPS = 30


def listening(connections: list[Any]) -> set[int]:
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def test_a_run_outlives_its_worker_and_its_learner_stops_with_a_checkpoint_and_resumes_though_it_is_damaged(
    tmp_path: Path,
):
    furnish(tmp_path)
    with disturbed(tmp_path, "hurt", f"loop.steps={STEPS}", "checkpoint.every=5") as run:
        run.wait_for(lambda: run.trained(6))
        assert run.hurt("worker")
        run.wait_for(lambda: run.trained(8))
        assert run.hurt("learner")
        run.wait_for(lambda: "run.recovering" in run.events and run.trained(12))
        teacher = run.part("teacher")
        assert teacher is not None
        ports = listening(teacher.net_connections("tcp4"))
        assert run.hurt("driver", signal.SIGTERM)
        assert (run.end(), run.status) == (0, "cancelled"), run.said
        assert run.events[-1] == "run.stopped"
        assert "--resume" in run.said[-1]
        newest = max((run.folder / "checkpoints").glob("step-??????"))
        assert newest.name == f"step-{run.steps[-1]['step']:06d}"
        assert re.fullmatch(rf"The run was cancelled after step \d+ of {STEPS}\.", run.headline)
        run.check_nothing_is_left()
        assert ports
        assert ports.isdisjoint(listening(psutil.net_connections("tcp4")))

        flip_a_bit(newest / "trainer" / "optimizer.safetensors")
        run.start(resume=True)
        assert run.end() == 0, run.said
        assert {"worker.lost", "run.recovering", "checkpoint.corrupted", "run.resumed"} <= set(run.events)
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        run.check_nothing_is_left()


def test_a_journal_on_a_full_disk_names_the_folder_and_tears_no_line(tmp_path: Path):
    journal = Journal(tmp_path / "run")
    journal.event("run.started", "x")
    with files_of_at_most(300), pytest.raises(RunError, match=r"run: disk is full: free space .* events.jsonl"):
        journal.event("step.finished", "y" * 300)
    written = [event["seq"] for event in read_jsonl(journal.folder / "events.jsonl")]
    journal.event("run.resumed", "z")
    events = list(read_jsonl(journal.folder / "events.jsonl"))
    assert [event["seq"] for event in events] == [*written, len(written) + 1]
    assert events[-1]["type"] == "run.resumed"


def test_a_status_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    journal = Journal(tmp_path / "run")
    journal.status(Status.RUNNING)
    with files_of_at_most(8), pytest.raises(RunError, match=os.strerror(errno.EFBIG) + "|disk is full"):
        journal.status(Status.SUCCEEDED)
    assert json.loads((journal.folder / "status.json").read_text())["status"] == "running"
    assert [path.name for path in journal.folder.glob(".status*")] == []
