"""A run whose rollout worker may have no more memory. RLIMIT_AS stands for a machine that has none left.

A worker that the kernel ends for its memory dies by SIGKILL, which test_kills.py sends: it is replaced.
"""

from __future__ import annotations

import resource
from pathlib import Path

from tests.chaos.conftest import STEPS
from tests.disturbance import disturbed


def test_a_worker_without_memory_is_replaced_or_named(place: Path, undisturbed: str):
    with disturbed(place, "memory", f"loop.steps={STEPS}", "checkpoint.every=5") as run:
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
