"""What each fault does to a run, the short version: one run that is hurt by and by, and what the parts of it promise.

The long version, with frozen processes, cut networks and full disks, is `make chaos`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
from pathlib import Path

import pytest

from orchestrator.pulse import server_pulse
from potstill.errors import RunError, WorkerLost
from potstill.journal import Journal, Status, read_jsonl
from potstill.processes import start
from tests.disks import files_of_at_most, flip_a_bit
from tests.disturbance import disturbed, furnish
from tests.tiny_models import save_tiny_model

STEPS = 30


def test_a_run_outlives_its_worker_and_its_learner_and_resumes_after_sigterm_and_damage(tmp_path: Path):
    furnish(tmp_path)
    changes = (f"loop.steps={STEPS}", "checkpoint.every=5")
    with disturbed(tmp_path, "hurt", *changes) as run:
        run.wait_for(lambda: run.trained(6))
        assert run.hurt("worker")
        run.wait_for(lambda: run.trained(8))
        assert run.hurt("learner")
        run.wait_for(lambda: "run.recovering" in run.events and len(run.steps) >= 14)
        assert run.hurt("driver", signal.SIGTERM)
        assert run.end() == 0, run.said
        assert run.status == "cancelled"
        run.check_nothing_is_left()

        newest = max((run.folder / "checkpoints").glob("step-??????"))
        flip_a_bit(newest / "trainer" / "optimizer.safetensors")
        run.start(resume=True)
        assert run.end() == 0, run.said
        assert {"worker.lost", "run.recovering", "checkpoint.corrupted", "run.resumed"} <= set(run.events)
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        run.check_nothing_is_left()


async def test_a_server_that_freezes_is_ended_and_lost(tmp_path: Path):
    model = save_tiny_model(tmp_path / "model", seed=1)
    arguments = [str(model), "--exit-with-parent"]
    child = await start("teacher server", "teacher_server", arguments, log=tmp_path / "log", env={}, timeout_s=90.0)
    watching = asyncio.create_task(server_pulse(child, silence_s=2.0))
    await asyncio.sleep(3.0)
    assert not watching.done()
    child.process.send_signal(signal.SIGSTOP)
    with pytest.raises(WorkerLost, match="the teacher server has given no sign of life for 2 s and was ended"):
        await asyncio.wait_for(watching, 10.0)
    assert child.process.returncode == -signal.SIGKILL


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
