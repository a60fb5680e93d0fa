"""Runs whose teacher goes away, comes back, or answers badly: they wait, and pay for nothing twice."""

from __future__ import annotations

import time
from pathlib import Path

from tests.chaos.conftest import STEPS
from tests.chaos.teachers import KEY, external, spoiling
from tests.disturbance import disturbed

CHANGES = (f"loop.steps={STEPS}", "checkpoint.every=10")
WAIT_S = 40.0  # longer than a server needs to start


def test_a_run_waits_for_its_teacher_and_not_for_ever(place: Path, undisturbed: str):
    key = {"TEACHER_KEY": KEY}
    with (
        external(place) as teacher,
        disturbed(place, "away", *CHANGES, f"loop.teacher_wait_s={WAIT_S}", *teacher.changes, environment=key) as run,
    ):
        run.wait_for(lambda: run.trained(5))
        teacher.kill()
        run.wait_for(lambda: run.status == "waiting_teacher")
        time.sleep(2.0)
        teacher.start()
        run.wait_for(lambda: run.status == "running" and run.trained(14))
        assert {"teacher.away", "teacher.back"} <= set(run.events)

        teacher.kill()
        assert run.end() == 3
        assert (run.status, run.cause["category"]) == ("failed", "teacher")
        assert "loop.teacher_wait_s" in run.said[-1]
        assert run.said[-1].count("\n") == 1
        run.check_nothing_is_left()
        paid = {path: path.stat().st_mtime_ns for path in (run.folder / "rollouts").glob("*.safetensors")}

        teacher.start()
        run.start(resume=True)
        run.wait_for(lambda: "run.resumed" in run.events)
        again = {path: path.stat().st_mtime_ns for path in paid if path.exists()}
        assert again.items() <= paid.items()
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        assert run.weights() == undisturbed


def test_bad_answers_cost_time_and_nothing_else(place: Path, undisturbed: str):
    script = ("pass", "pass", "busy", "pass", "slow down", "pass", "half", "pass", "hang", "pass", "reset", "pass")
    with external(place) as teacher, spoiling(teacher, script) as proxy:
        key = {"TEACHER_KEY": KEY}
        with disturbed(place, "spoilt", *CHANGES, *proxy.met.changes, environment=key) as run:
            run.wait_for(lambda: run.trained(1))  # it was met, and examined
            proxy.spoils = True
            assert run.end() == 0, run.said
            assert set(script) <= set(proxy.done)
            run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
            assert run.weights() == undisturbed
            run.check_nothing_is_left()
