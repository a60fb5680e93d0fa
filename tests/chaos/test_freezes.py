"""Runs with a process stopped and continued: they go on without it, and it cannot write when it wakes."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.conftest import STEPS
from tests.disturbance import Disturbed, disturbed

SILENCE_S = 6.0
FROZEN = (f"loop.steps={STEPS}", f"loop.silence_s={SILENCE_S}", "teacher.deadline_s=4", "checkpoint.every=5")


def freeze(run: Disturbed, part: str) -> psutil.Process:
    process = run.part(part)
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    return process


@pytest.mark.parametrize(
    ("part", "event", "wakes"),
    [("worker", "worker.lost", False), ("learner", "run.recovering", True), ("teacher", "run.recovering", False)],
    ids=["worker", "learner-that-wakes", "teacher"],
)
def test_a_frozen_process_is_replaced_and_the_weights_are_the_same(
    place: Path, undisturbed: str, part: str, event: str, wakes: bool
):
    with disturbed(place, f"frozen-{part}", *FROZEN) as run:
        run.wait_for(lambda: run.trained(7))
        process = freeze(run, part)
        run.wait_for(lambda: event in run.events, limit_s=120.0)
        if wakes:  # and would write what it was at
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        run.wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed
        run.check_nothing_is_left()


@pytest.mark.parametrize("part", ["worker", "learner"])
def test_a_process_that_freezes_while_it_starts_is_replaced(place: Path, undisturbed: str, part: str):
    with disturbed(place, f"frozen-early-{part}", *FROZEN) as run:
        spans = run.folder / "spans" / f"{part}-0.jsonl"  # there as soon as the process begins to load
        run.wait_for(spans.exists)
        freeze(run, part)
        assert run.end() == 0, run.said
        assert run.weights() == undisturbed
        run.check_nothing_is_left()


def test_a_frozen_driver_goes_on_where_it_was(place: Path, undisturbed: str):
    with disturbed(place, "frozen-driver", *FROZEN) as run:
        run.wait_for(lambda: run.trained(7))
        driver = freeze(run, "driver")
        time.sleep(2 * SILENCE_S)
        driver.send_signal(signal.SIGCONT)
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed
        assert not {"run.recovering", "worker.lost"} & set(run.events)
        run.check_nothing_is_left()
