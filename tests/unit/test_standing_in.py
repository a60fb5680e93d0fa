"""Which run may go on without the folder that its student began in, and on what."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.standing_in import with_a_student
from potstill.config import RunConfig
from potstill.journal import KEPT
from tests.checkpoints import RUNS
from tests.disks import flip_a_bit
from tests.run_folders import make_checkpoint
from tests.trainers import make_config


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run with two checkpoints, beside the folder that its student began in."""
    (tmp_path / "start").mkdir()
    for step in (10, 20):
        make_checkpoint(tmp_path / "runs" / "child", step)
    return tmp_path


def config(place: Path, *, rollout: dict[str, Any] | None = None, **run: Any) -> RunConfig:
    student = {"model": str(place / "start"), **run.pop("student", {})}
    made = make_config(**run, student=student)
    where = {"name": "child", "runs": str(place / "runs")}
    return made.model_copy(update={**where, "rollout": made.rollout.model_copy(update=rollout or {})})


def test_a_folder_that_is_there_is_used(begun: Path):
    asked = config(begun, **RUNS["all weights"])
    assert with_a_student(asked) == asked
    assert not list(begun.rglob(KEPT))


@pytest.mark.parametrize("run", ["all weights", "ema"])
def test_the_newest_checkpoint_stands_in_for_a_folder_that_is_gone(begun: Path, run: str):
    shutil.rmtree(begun / "start")
    asked, newest = config(begun, **RUNS[run]), begun / "runs" / "child" / "checkpoints" / "step-000020"
    found = with_a_student(asked)
    assert found.student.model == str(newest / "model")
    assert found.model_copy(update={"student": asked.student}) == asked
    assert list(begun.rglob(KEPT)) == [newest / KEPT]


def test_a_damaged_checkpoint_stands_in_for_nothing(begun: Path):
    shutil.rmtree(begun / "start")
    asked = config(begun, **RUNS["all weights"])
    older, newest = sorted((begun / "runs" / "child" / "checkpoints").iterdir())
    flip_a_bit(newest / "model" / "model.safetensors")
    assert with_a_student(asked).student.model == str(older / "model")
    flip_a_bit(older / "model" / "model.safetensors")
    assert with_a_student(asked) == asked
    assert list(begun.rglob(KEPT)) == [older / KEPT]


@pytest.mark.parametrize(
    "run",
    [
        RUNS["adapter"],
        RUNS["frozen"],
        {**RUNS["ema"], "rollout": {"source": "teacher"}},
        {"method": "exopd"},
        {"method": "opd", "rollout": {"source": "snapshot"}},
    ],
)
def test_nothing_stands_in_for_the_student_as_the_run_found_it(begun: Path, run: dict[str, Any]):
    shutil.rmtree(begun / "start")
    asked = config(begun, **run)
    assert with_a_student(asked) == asked


def test_a_run_without_a_checkpoint_needs_the_folder(tmp_path: Path):
    asked = config(tmp_path, **RUNS["all weights"])
    assert with_a_student(asked) == asked
