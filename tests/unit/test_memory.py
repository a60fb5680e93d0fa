"""What counts as having no memory, and what a run is advised to write then."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator import memory
from orchestrator.memory import Kernel, advice, was_refused
from potstill.config import LearnerConfig, RolloutConfig, SamplingConfig, StudentConfig
from potstill.config_teachers import ServerTeacher
from potstill.errors import CapacityError, MemoryLost, WorkerLost

TOO_MUCH = 1 << 60  # bytes
SECTIONS = {
    "learner": LearnerConfig,
    "rollout": RolloutConfig,
    "rollout.sampling": SamplingConfig,
    "student": StudentConfig,
    "teacher": ServerTeacher,
}


def counts(file: Path, ended: int) -> None:
    file.write_text(f"nr_free_pages 17\noom_kill {ended}\npgfault 5\n")


def test_a_count_that_grows_is_news_for_a_short_while(tmp_path: Path):
    counts(file := tmp_path / "vmstat", 3)
    kernel = Kernel(file)
    assert not kernel.has_just_ended_one()
    counts(file, 4)
    assert [kernel.has_just_ended_one() for _ in range(2)] == [True, True]  # whoever asks is told
    assert not Kernel(file).has_just_ended_one()


async def test_what_was_ended_long_ago_is_no_news(tmp_path: Path):
    counts(file := tmp_path / "vmstat", 3)
    kernel = Kernel(file, recent_s=0.1)
    counts(file, 4)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(kernel.watch(), 0.3)
    assert not kernel.has_just_ended_one()


def test_a_machine_whose_kernel_counts_nothing_has_no_news(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert not Kernel(tmp_path / "nowhere").has_just_ended_one()
    assert not Kernel(tmp_path / "empty").has_just_ended_one()


def test_a_loss_is_of_memory_where_the_kernel_has_just_ended_a_process(tmp_path: Path):
    counts(file := tmp_path / "vmstat", 0)
    kernel = Kernel(file)
    assert type(memory.loss("learner", WorkerLost, "it died", kernel)) is WorkerLost
    counts(file, 1)
    loss = memory.loss("rollout worker 3", WorkerLost, "it died", kernel)
    assert isinstance(loss, MemoryLost)
    assert (loss.category, isinstance(loss, CapacityError)) == ("capacity", True)
    assert str(loss).startswith("it died; the kernel has just ended a process for its memory: lower rollout.workers")


def refusal(ask: object) -> BaseException:
    try:
        ask()  # type: ignore[operator]
    except (MemoryError, RuntimeError, OSError) as error:
        return error
    raise AssertionError("there was enough")


def test_what_python_and_torch_say_when_there_is_no_memory_is_understood():
    assert was_refused(refusal(lambda: bytearray(TOO_MUCH)))
    assert was_refused(refusal(lambda: np.empty(TOO_MUCH, np.uint8)))
    assert was_refused(refusal(lambda: torch.empty(TOO_MUCH, dtype=torch.uint8)))
    assert was_refused(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert was_refused(OSError(12, "Cannot allocate memory"))


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(28, "No space left"), KeyError("memory")])
def test_other_failures_are_not_of_memory(error: Exception):
    assert not was_refused(error)


@pytest.mark.parametrize("who", memory.ADVICE)
def test_the_advice_names_settings_that_there_are(who: str):
    names = [word.strip("(),:") for word in advice(who).split() if "." in word]
    assert names
    for name in names:
        section, _, key = name.rpartition(".")
        assert key in SECTIONS[section].model_fields, name
