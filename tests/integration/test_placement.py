"""Runs on a cluster of real Ray nodes: what finds no room says so, and workers come and go with their nodes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disturbance import LONG, SUPERVISED, disturbed, furnish
from tests.ray_nodes import DESK, ROOM, Nodes, ray_nodes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("placed")
    furnish(place)
    return place


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster whose one node has room for a learner and a worker; runs that are started find it."""
    with ray_nodes(desk=1, room=1) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ("resources.learner={cpus: 1, gpus: 2}",),
            "no room for the learner within 2 s (resources.wait_s): 1 CPU, 2 GPU (PACK) is asked for. One process "
            "needs 2 GPU, and no node has more than 0. Nodes: 127.0.0.1 has 1 CPU, 0 GPU.",
        ),
        (
            (DESK, ROOM, "rollout.workers=3", "rollout.min_workers=2"),
            "no room for the rollout workers within 2 s (resources.wait_s): 2 × 1 room (each where there is room) is "
            "asked for. 2 room are needed, and all nodes together have 1.",
        ),
    ],
    ids=["learner", "workers"],
)
def test_a_run_that_finds_no_room_fails_in_time_and_says_what_is_missing(
    place: Path, nodes: Nodes, request: pytest.FixtureRequest, changes: tuple[str, ...], says: str
):
    name = f"no-room-{request.node.callspec.id}"
    with disturbed(place, name, *SUPERVISED, "loop.steps=1", "resources.wait_s=2", *changes) as run:
        assert run.end(limit_s=60.0) == 1
        assert says in " ".join(run.said[0].split())
        assert run.status == "failed"


@pytest.mark.long
def test_a_worker_joins_and_leaves_with_its_node_and_every_prompt_is_trained_once(place: Path, nodes: Nodes):
    changes = ("teacher={kind: local, models: [{model: teacher}]}", "rollout.workers=2", "loop.max_staleness=2")
    with disturbed(place, "elastic", LONG, *changes, DESK, ROOM) as run:
        run.wait_for(lambda: run.trained(1))
        (first,) = run.writers
        raylet = nodes.add(room=1)
        run.wait_for(lambda: len(run.writers) == 2)
        os.kill(raylet, signal.SIGKILL)
        run.wait_for(lambda: "worker.lost" in run.events)
        left = len(run.steps)
        run.wait_for(lambda: run.trained(left + 5))
        assert run.hurt("driver", signal.SIGTERM)
        assert run.end() == 0
        run.check_ledger(steps=len(run.steps), prompts_per_step=4, max_staleness=2)
        assert first in run.writers
