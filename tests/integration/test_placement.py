"""Runs on a cluster of real Ray nodes: what finds no room says so, and workers come and go with their nodes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from orchestrator import cluster
from orchestrator.outcome import end
from potstill.journal import read_jsonl
from tests.disturbance import Disturbed, disturbed, furnish
from tests.ray_nodes import Nodes, ray_nodes

STEPS = 300
DESK, ROOM = "resources.learner.custom={desk: 1}", "resources.rollout.custom={room: 1}"
LOCAL = ("teacher={kind: local, models: [{model: teacher}]}", "checkpoint.every=100")
SUPERVISED = ("method=sft", "rollout.source=reference", "teacher={kind: none}")


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


def test_workers_join_and_leave_with_their_nodes_and_every_prompt_is_trained_once(place: Path, nodes: Nodes):
    changes = ("rollout.workers=2", "loop.max_staleness=2", f"loop.steps={STEPS}")
    with disturbed(place, "elastic", *LOCAL, *changes, DESK, ROOM) as run:
        run.wait_for(lambda: run.trained(1))
        (first,) = writers(run)
        raylet = nodes.add(room=1)
        run.wait_for(lambda: len(writers(run)) == 2)
        os.kill(raylet, signal.SIGKILL)
        run.wait_for(lambda: "worker.lost" in run.events)
        left = len(run.steps)
        assert run.end() == 0
        assert left < STEPS
        run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=2)
        assert first in writers(run)


def writers(run: Disturbed) -> set[str]:
    """Workers that have written a chunk."""
    files = (run.folder / "spans").glob("worker-*.jsonl")
    return {file.stem for file in files if any(span["name"] == "generate" for span in read_jsonl(file))}


async def test_a_process_that_is_frozen_ends_all_the_same(monkeypatch: pytest.MonkeyPatch):
    class Idle:  # in here, so that Ray sends it by value: tests are no package
        pass

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.connect({})
    try:
        actor = cluster.actor(Idle, cluster.holding({}), {})
        process = psutil.Process(await actor.__ray_call__.remote(lambda _: os.getpid()))
        process.suspend()
        await end(actor)
        assert psutil.wait_procs([process], timeout=20.0)[1] == []
    finally:
        ray.shutdown()
