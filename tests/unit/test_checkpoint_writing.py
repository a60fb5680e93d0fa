"""Training goes on while a checkpoint is written; whatever stops the writing, those before it are found again."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from learner import checkpoint
from potstill import manifest
from potstill.config import CheckpointConfig
from potstill.durable import sweep
from potstill.errors import Fenced, RunError
from potstill.fencing import Fence, next_attempt
from potstill.journal import checkpoints
from tests.checkpoints import RUNS, make_trainer, save, save_students, train, write
from tests.disks import files_of_at_most, flip_a_bit
from tests.trainers import same, weights_of

every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_students(tmp_path_factory.mktemp("models"))


@every_run
def test_what_is_captured_no_later_step_touches(run: dict[str, Any], models: Path, tmp_path: Path) -> None:
    """It is written by a thread, while the trainer goes on."""
    through = train(make_trainer(models / "untied", **run), 1, 2)
    captured = checkpoint.capture(through)
    train(through, 3, 3)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write, captured, tmp_path / "step-000002", models / "untied")
        train(through, 4, 4)
        folder = writing.result()

    resumed = make_trainer(models / "untied", **run)
    checkpoint.restore(resumed, folder)
    assert resumed.version == 2
    train(resumed, 3, 4)
    assert same(weights_of(through.student), weights_of(resumed.student))
    assert same(through.inner.state(), resumed.inner.state())


def test_what_is_captured_is_written_the_same_however_late(models: Path, tmp_path: Path) -> None:
    trainer = train(make_trainer(models / "tied", **RUNS["adapter, ema"]), 1, 2)
    captured = checkpoint.capture(trainer)
    at_once = manifest.digest(write(captured, tmp_path / "one", models / "tied"))
    train(trainer, 3, 4)
    assert manifest.digest(write(captured, tmp_path / "two", models / "tied")) == at_once


def test_random_numbers_continue_where_they_were(models: Path, tmp_path: Path) -> None:
    folder = save(make_trainer(models / "untied"), tmp_path / "step-000000", models / "untied")
    drawn = torch.rand(3)
    torch.manual_seed(99)
    checkpoint.restore(make_trainer(models / "untied"), folder)
    assert torch.equal(torch.rand(3), drawn)


@pytest.fixture
def three(models: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 8, 9 and 10."""
    captured = checkpoint.capture(make_trainer(models / "untied"))
    for step in (8, 9, 10):
        write(captured, tmp_path / "checkpoints" / f"step-{step:06d}", models / "untied")
    return tmp_path / "checkpoints"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_folder(path: Path) -> None:
    """Which cannot be read as a file: a read fails, as on a bad sector."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink, replace_by_folder])
@pytest.mark.parametrize("file", ["model/model.safetensors", "trainer/state.json", "manifest.json"])
def test_a_damaged_newest_one_is_named_and_the_one_before_it_taken(
    three: Path, damage: Callable[[Path], None], file: str
) -> None:
    assert manifest.newest_good(three) == (three / "step-000010", [])
    damage(three / "step-000010" / file)
    folder, damaged = manifest.newest_good(three)
    assert folder == three / "step-000009"
    assert len(damaged) == 1
    assert "step-000010" in damaged[0]


def test_where_all_are_damaged_none_is_taken(three: Path) -> None:
    for path in three.glob("*/trainer/optimizer.safetensors"):
        flip_a_bit(path)
    for path in three.glob("*/model/model.safetensors"):
        flip_a_bit(path)
    folder, damaged = manifest.newest_good(three)
    assert folder is None
    assert [reason.partition(":")[0][-2:] for reason in damaged] == ["10", "09", "08"]


def test_where_there_is_none_none_is_taken(tmp_path: Path) -> None:
    assert manifest.newest_good(tmp_path / "checkpoints") == (None, [])


def test_an_attempt_that_is_over_writes_none(models: Path, tmp_path: Path) -> None:
    captured, fence = checkpoint.capture(make_trainer(models / "untied")), Fence(tmp_path, next_attempt(tmp_path))
    next_attempt(tmp_path)
    parent = tmp_path / "checkpoints"
    with pytest.raises(Fenced, match="attempt 2 has begun"):
        write(captured, parent / "step-000000", models / "untied", fence=fence)
    assert list(parent.iterdir()) == []


def test_a_full_disk_is_one_error_that_costs_none_of_those_before(three: Path, models: Path) -> None:
    captured = checkpoint.capture(make_trainer(models / "untied"))
    before = set(three.iterdir())
    for num_bytes in (100, 5_000, 40_000):  # the first file that does not fit is another one
        with files_of_at_most(num_bytes), pytest.raises(RunError) as caught:
            write(captured, three / "step-000011", models / "untied")
        assert str(caught.value).startswith(f"{three}: disk is full: free space and resume")
        assert set(three.iterdir()) == before
    assert manifest.newest_good(three) == (three / "step-000010", [])
    assert write(captured, three / "step-000011", models / "untied") == three / "step-000011"


def write_for_ever(captured: checkpoint.Captured, parent: Path, tokenizer: Path, first: int) -> None:
    for step in range(first, first + 100_000):
        write(captured, parent / f"step-{step:06d}", tokenizer)


def test_a_writer_killed_at_any_moment_leaves_whole_checkpoints_alone(models: Path, tmp_path: Path) -> None:
    captured, parent = checkpoint.capture(make_trainer(models / "untied", **RUNS["adapter, ema"])), tmp_path / "all"
    processes, random = multiprocessing.get_context("fork"), np.random.default_rng(0)
    for number in range(25):
        arguments = (captured, parent, models / "untied", 1_000 * number)
        writer = processes.Process(target=write_for_ever, args=arguments)
        writer.start()
        time.sleep(random.uniform(0.005, 0.1))
        writer.kill()
        writer.join()
    assert any(path.name.startswith(".") for path in parent.iterdir()), "a kill in the middle of a write"
    whole = checkpoints(parent)
    assert whole
    for folder in whole:
        manifest.verify(folder)
    sweep(parent)
    assert set(parent.iterdir()) == set(whole)


def test_a_run_that_would_keep_one_checkpoint_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        CheckpointConfig(keep=1)
