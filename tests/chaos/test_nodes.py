"""A run on a cluster whose nodes come and go, from its first step to its last; the short version is CI's."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.disturbance import disturbed
from tests.ray_nodes import DESK, ROOM, ray_nodes

STEPS = 300
CHANGES = ("teacher={kind: local, models: [{model: teacher}]}", "checkpoint.every=100", f"loop.steps={STEPS}")


def test_workers_join_and_leave_with_their_nodes_and_every_prompt_is_trained_once(place: Path):
    with (
        ray_nodes(desk=1, room=1) as nodes,
        disturbed(
            place, "elastic", *CHANGES, "rollout.workers=2", "loop.max_staleness=2", DESK, ROOM,
            environment=nodes.environment,
        ) as run,
    ):  # fmt: skip
        run.wait_for(lambda: run.trained(1))
        (first,) = run.writers
        for _ in range(2):
            raylet, losses = nodes.add(room=1), run.events.count("worker.lost")
            run.wait_for(lambda: len(run.writers) == 2)
            os.kill(raylet, signal.SIGKILL)
            run.wait_for(lambda before=losses: run.events.count("worker.lost") > before)  # type: ignore[misc]
        left = len(run.steps)
        assert run.end() == 0
        assert left < STEPS
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=2)
        assert first in run.writers
