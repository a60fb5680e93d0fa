"""`potstill run`, stopped from outside or with a process lost for good: it says so, and leaves nothing behind."""

from __future__ import annotations

import html
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.disturbance import RAYS_AGENTS, Disturbed, disturbed, furnish

LONG = "loop.steps=1000000"
SUPERVISED = ("method=sft", "rollout.source=reference", "teacher={kind: none}")  # starts sooner, and without a teacher


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("interrupted")
    furnish(place)
    return place


def headline(run: Disturbed) -> str:
    """What the page of the run says first."""
    page = (run.folder / "report.html").read_text()
    return html.unescape(page.partition("<h1>")[2].partition("</h1>")[0])


def listening(connections: list[Any]) -> set[int]:
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def test_sigterm_leaves_a_checkpoint_and_nothing_else(place: Path):
    with disturbed(place, "asked", LONG) as run:
        run.wait_for(lambda: run.trained(2))
        teacher = run.part("teacher")
        assert teacher is not None
        ports = listening(teacher.net_connections("tcp4"))
        run.hurt("driver", signal.SIGTERM)
        assert (run.end(), run.status) == (0, "cancelled")
        assert run.events[-1] == "run.stopped"
        assert "--resume" in run.said[-1]
        newest = max((run.folder / "checkpoints").glob("step-??????"))
        assert newest.name == f"step-{run.steps[-1]['step']:06d}"
        assert re.fullmatch(r"The run was cancelled after step [\d,]+ of 1,000,000\.", headline(run))
        run.check_nothing_is_left()
        assert ports.isdisjoint(listening(psutil.net_connections("tcp4")))
        assert ports


@pytest.mark.parametrize(
    ("numbers", "exit_code"), [((signal.SIGTERM, signal.SIGTERM), 5), ((signal.SIGINT,), 130)], ids=["twice", "ctrl-c"]
)
def test_who_does_not_wait_for_a_checkpoint_gets_an_end_at_once(
    place: Path, numbers: tuple[signal.Signals, ...], exit_code: int
):
    with disturbed(place, f"at-once-{exit_code}", LONG, "checkpoint.every=0", *SUPERVISED) as run:
        run.wait_for(lambda: run.trained(2))
        learner = run.part("learner")
        assert learner is not None
        learner.send_signal(signal.SIGSTOP)  # no step ends and no checkpoint is written
        for number in numbers:
            run.hurt("driver", number)
        assert (run.end(limit_s=30.0), run.status) == (exit_code, "cancelled")
        assert "Traceback" not in run.said[-1]
        assert run.events[-1] == "run.cancelled"
        run.check_nothing_is_left()


@pytest.mark.parametrize(
    ("victim", "kind", "says", "changes"),
    [
        ("teacher", "WorkerLost", "the teacher server ended with exit code -9", ()),
        ("worker", "WorkerLost", "the rollout worker's process died", SUPERVISED),
        ("learner", "LearnerLost", "the learner's process died", SUPERVISED),
    ],
    ids=["teacher", "worker", "learner"],
)
def test_a_run_that_may_lose_no_process_fails_with_its_name_and_leaves_nothing(
    place: Path, victim: str, kind: str, says: str, changes: tuple[str, ...]
):
    with disturbed(place, f"lost-{victim}", LONG, "loop.restarts=0", *changes) as run:
        run.wait_for(lambda: run.trained(2))
        assert run.hurt(victim)
        assert (run.end(), run.status) == (1, "failed")
        assert (run.cause["type"], run.cause["category"]) == (kind, "system")
        assert says in run.cause["message"]
        assert re.fullmatch(rf"The run failed after step [\d,]+ of 1,000,000: .*{says}.*", headline(run))
        assert says in run.said[-1]
        assert run.said[-1].count("\n") == 1
        run.check_nothing_is_left()


def test_a_run_that_is_killed_itself_takes_its_processes_along(place: Path):
    with disturbed(place, "killed", LONG) as run:
        run.wait_for(lambda: run.trained(2))
        run.hurt("driver", signal.SIGKILL)
        run.end()
        run.check_nothing_is_left(but=RAYS_AGENTS)
        assert run.status == "running"
