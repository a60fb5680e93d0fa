"""One place with a student, a teacher and prompts for all runs that are hurt, and what the run left alone gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.disturbance import disturbed, furnish

STEPS = 30


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chaos")
    furnish(place)
    return place


@pytest.fixture(scope="session")
def undisturbed(place: Path) -> str:
    """The weights after STEPS steps of a run that was left alone; another number of steps ends elsewhere."""
    with disturbed(place, "undisturbed", f"loop.steps={STEPS}") as run:
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
        run.check_nothing_is_left()
        return run.weights()
