"""Runs ahead of their learner, with processes killed: every prompt is trained once, and nothing that is too old."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.journal import read_jsonl
from tests.disturbance import Disturbed, disturbed

STEPS = 60
STALENESS = 1
AHEAD = (f"loop.steps={STEPS}", f"loop.max_staleness={STALENESS}", "rollout.workers=2", "rollout.prompts_per_call=2")
FINISH = ("loop.order=finish", "loop.oversample=0.5")


@pytest.mark.parametrize("changes", [(), FINISH], ids=["prompt", "finish"])
def test_kills_lose_and_double_no_prompt(place: Path, changes: tuple[str, ...]):
    with disturbed(place, f"ahead-{len(changes)}", *AHEAD, *changes) as run:
        for number, victim in enumerate(("worker", "worker", "learner", "worker", "teacher", "driver")):
            wanted = 4 + 8 * number
            run.wait_for(lambda wanted=wanted: run.trained(wanted))  # type: ignore[misc]
            assert run.hurt(victim)
        run.end()
        run.start(resume=True)
        assert run.end() == 0, run.said
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=STALENESS)
        check_versions(run)
        run.check_nothing_is_left()


def check_versions(run: Disturbed) -> None:
    """A rollout's tokens are of versions that were published, in order, and none that is too old. One may be newer than
    its step where the run went back: what was paid for before is trained, and not written again."""
    samples = list(read_jsonl(run.folder / "samples.jsonl"))
    assert samples
    for sample in samples:
        versions = [token["version"] for token in sample["tokens"] if token["version"] >= 0]
        assert versions == sorted(versions)
        assert set(versions) <= set(range(STEPS + 1))
        assert versions[0] >= sample["step"] - 1 - STALENESS
