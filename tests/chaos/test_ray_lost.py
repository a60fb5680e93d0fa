"""Runs that lose Ray itself: they stop with the cause, leave nothing behind, and resume on another Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.conftest import STEPS
from tests.disturbance import disturbed


@pytest.mark.parametrize("part", ["raylet", "head"])
def test_a_run_without_its_ray_says_so_and_resumes(place: Path, undisturbed: str, part: str):
    with disturbed(place, f"without-{part}", f"loop.steps={STEPS}", "checkpoint.every=5") as run:
        run.wait_for(lambda: run.trained(8))
        assert run.hurt(part)
        assert run.end(limit_s=90.0) == 1
        assert run.status == "failed"
        assert run.cause["category"] == "system"
        assert "Ray" in run.cause["message"]
        assert run.said[-1].count("\n") == 1
        run.check_nothing_is_left()

        run.start(resume=True)
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed
