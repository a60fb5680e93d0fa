"""Runs whose disk is full or damages what it holds: a clear cause, and a resume to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import STEPS
from tests.disks import flip_a_bit
from tests.disturbance import disturbed

SMALL_BYTES = 64 << 20
CHANGES = (f"loop.steps={STEPS}", "checkpoint.every=5")


@pytest.fixture
def small(place: Path) -> Iterator[Path]:
    """A file system of its own, so small that it can be filled."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system of its own")
    folder = place / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "potstill-chaos", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            return filler


def test_a_full_disk_is_named_and_after_making_room_the_run_goes_on(place: Path, undisturbed: str, small: Path):
    with disturbed(place, "full", *CHANGES, runs="small") as run:
        run.wait_for(lambda: run.trained(8))
        filler = fill(small)
        assert run.end() == 1
        assert f"{run.runs}/{run.name}" in run.said[-1]
        assert "disk is full: free space and resume" in run.said[-1]
        assert run.said[-1].count("\n") == 1
        run.check_nothing_is_left()

        filler.unlink()
        run.start(resume=True)
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed


def test_a_damaged_checkpoint_and_a_cut_chunk_are_noticed_and_done_again(place: Path, undisturbed: str):
    with disturbed(place, "damaged", *CHANGES) as run:
        run.wait_for(lambda: run.trained(12))
        assert run.hurt("driver", signal.SIGTERM)
        assert run.end() == 0, run.said
        assert run.status == "cancelled"
        run.check_nothing_is_left()

        newest = max((run.folder / "checkpoints").glob("step-??????"))
        assert newest.name == f"step-{len(run.steps):06d}"
        flip_a_bit(newest / "trainer" / "optimizer.safetensors")
        chunk = max((run.folder / "rollouts").glob("*.safetensors"))
        os.truncate(chunk, chunk.stat().st_size - 8)
        run.start(resume=True)
        assert run.end() == 0, run.said
        assert {"checkpoint.corrupted", "spool.corrupted", "run.resumed"} <= set(run.events)
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed
