"""`potstill run`, stopped from outside or with a process lost for good: it says so, and leaves nothing behind.

A SIGTERM in the middle of a run is test_faults.py's; the learner and a worker that are lost for good are chaos.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.disturbance import LONG, RAYS_AGENTS, SUPERVISED, disturbed, furnish, lost_for_good


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("interrupted")
    furnish(place)
    return place


def test_a_run_that_is_asked_to_stop_while_its_ray_starts_is_stopped_as_any_other(place: Path):
    with disturbed(place, "asked-early", LONG, *SUPERVISED) as run:
        run.wait_for(lambda: run.part("head") is not None)
        run.hurt("driver", signal.SIGTERM)
        assert (run.end(limit_s=30.0), run.status) == (0, "cancelled")
        assert run.events == ["run.stopped"]
        assert "--resume" in run.said[-1]
        assert run.headline == "The run was cancelled before its first step."
        run.check_nothing_is_left()


@pytest.mark.parametrize(
    ("numbers", "exit_code"),
    [
        pytest.param((signal.SIGTERM, signal.SIGTERM), 5, id="twice", marks=pytest.mark.long),
        pytest.param((signal.SIGINT,), 130, id="ctrl-c"),
    ],
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


@pytest.mark.long
def test_a_run_that_may_lose_no_process_fails_with_its_name_and_leaves_nothing(place: Path):
    lost_for_good(place, "teacher", "WorkerLost", "the teacher server ended with exit code -9")


@pytest.mark.long
def test_a_run_that_is_killed_itself_takes_its_processes_along(place: Path):
    with disturbed(place, "killed", LONG) as run:
        run.wait_for(lambda: run.trained(2))
        run.hurt("driver", signal.SIGKILL)
        run.end()
        run.check_nothing_is_left(but=RAYS_AGENTS)
        assert run.status == "running"


def test_a_run_goes_on_without_the_folder_that_its_student_began_in(place: Path):
    began = place / "runs" / "parent" / "checkpoints" / "step-000010" / "model"
    shutil.copytree(place / "student", began)
    changes = (f"student.model={began}", "--resume-if-begun", "checkpoint.every=0", *SUPERVISED)
    with disturbed(place, "child", LONG, *changes) as run:
        run.wait_for(lambda: run.trained(2))
        shutil.rmtree(began.parent)
        run.hurt("driver", signal.SIGTERM)
        assert (run.end(), run.status) == (0, "cancelled")
        reached = len(run.steps)

        run.changes = (f"loop.steps={reached + 2}", *changes)
        run.start(resume=False)
        assert (run.end(), run.status) == (0, "succeeded"), run.said
        assert len(run.steps) == reached + 2
        files = [{path.name for path in folder.iterdir()} for folder in run.folder.glob("checkpoints/*/model")]
        assert len(files) == 2
        assert files[0] == files[1] >= {"tokenizer.json", "tokenizer_config.json"}
