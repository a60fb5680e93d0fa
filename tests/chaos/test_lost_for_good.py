"""Runs that may lose no process, and lose their worker or their learner; CI has the teacher's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.disturbance import SUPERVISED, lost_for_good


@pytest.mark.parametrize(
    ("victim", "kind", "says"),
    [
        ("worker", "WorkerLost", "the rollout worker's process died"),
        ("learner", "LearnerLost", "the learner's process died"),
    ],
)
def test_a_run_that_may_lose_no_process_fails_with_its_name_and_leaves_nothing(
    place: Path, victim: str, kind: str, says: str
):
    lost_for_good(place, victim, kind, says, *SUPERVISED)
