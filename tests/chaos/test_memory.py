"""Runs whose rollout worker may have no more memory: refused to it, or ended for it by the kernel."""

from __future__ import annotations

import resource
from pathlib import Path

from potstill.journal import read_jsonl
from tests.chaos.cgroups import starved
from tests.chaos.conftest import STEPS
from tests.disturbance import disturbed

FEW_BYTES = 1 << 18
CHANGES = (f"loop.steps={STEPS}", "checkpoint.every=5")


def test_a_worker_that_is_refused_memory_ends_the_run_with_advice(place: Path, undisturbed: str):
    """RLIMIT_AS stands for a machine that has none left."""
    with disturbed(place, "memory", *CHANGES) as run:
        run.wait_for(lambda: run.trained(8))
        worker = run.part("worker")
        assert worker is not None
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (worker.memory_info().vms, resource.RLIM_INFINITY))
        if run.end() != 0:
            assert run.cause["category"] in {"system", "capacity"}
            assert "rollout worker" in run.said[-1]
            run.start(resume=True)
            assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed
        run.check_nothing_is_left()


def test_a_worker_that_the_kernel_ends_for_its_memory_is_replaced_and_named(place: Path, undisturbed: str):
    with disturbed(place, "starved", *CHANGES) as run:
        run.wait_for(lambda: run.trained(8))
        worker = run.part("worker")
        assert worker is not None
        with starved(worker.pid, FEW_BYTES):
            run.wait_for(lambda: "worker.lost" in run.events, limit_s=120.0)
        (lost,) = [event for event in read_jsonl(run.folder / "events.jsonl") if event["type"] == "worker.lost"]
        assert lost["data"]["category"] == "capacity"
        assert "lower rollout.workers" in lost["message"]
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed
        run.check_nothing_is_left()
