"""A run whose teacher is behind a network that goes down for a while."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.conftest import STEPS
from tests.chaos.teachers import KEY, external
from tests.disturbance import disturbed

SPACE, OURS, THEIRS = "potstill-chaos", "potstill-a", "potstill-b"
HERE, THERE = "10.231.77.1", "10.231.77.2"
DOWN_S = 8.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def cable() -> Iterator[None]:
    """A network namespace, and the two ends of a cable to it."""
    try:
        ip("netns", "add", SPACE)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system permits no network namespaces")
    try:
        ip("link", "add", OURS, "type", "veth", "peer", "name", THEIRS, "netns", SPACE)
        ip("addr", "add", f"{HERE}/30", "dev", OURS)
        ip("link", "set", OURS, "up")
        for command in (["addr", "add", f"{THERE}/30", "dev", THEIRS], ["link", "set", THEIRS, "up"]):
            ip("-n", SPACE, *command)
        yield
    finally:
        ip("netns", "delete", SPACE)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may make a network namespace")
def test_a_run_goes_on_when_the_network_is_back(place: Path, undisturbed: str):
    inside = ("ip", "netns", "exec", SPACE)
    with cable(), external(place, host=THERE, inside=inside) as teacher:
        changes = (f"loop.steps={STEPS}", "checkpoint.every=10", *teacher.changes)
        with disturbed(place, "cut", *changes, environment={"TEACHER_KEY": KEY}) as run:
            run.wait_for(lambda: run.trained(5))
            ip("link", "set", OURS, "down")
            run.wait_for(lambda: run.status == "waiting_teacher")
            time.sleep(DOWN_S)
            ip("link", "set", OURS, "up")
            assert run.end() == 0, run.said
            assert {"teacher.away", "teacher.back"} <= set(run.events)
            run.check_ledger(steps=STEPS, prompts_per_step=4, max_staleness=0)
            assert run.weights() == undisturbed
            run.check_nothing_is_left()
