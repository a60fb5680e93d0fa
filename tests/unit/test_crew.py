"""How a crew's workers follow the learner, with what may come between: actors in this process, behind real handles."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.scale.one_process import Wire
from bench.scale.stand_ins import published
from orchestrator.crew import Crew
from orchestrator.learners import Learners
from orchestrator.roster import Roster, Worker
from potstill.config_file import parse
from potstill.errors import StaleWeights, TeacherUnavailable, WeightsError, WorkerLost
from potstill.journal import Journal, read_jsonl
from potstill.types import WeightsVersion


class LearningActor:
    """Publishes version after version."""

    def __init__(self) -> None:
        self.version = 0

    async def publish(self) -> WeightsVersion:
        self.version += 1
        return published(self.version)


class LoadingActor:
    """Raises each of `failures`, in turn, before it loads anything."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.asked: list[int] = []

    async def load_weights(self, version: WeightsVersion) -> int:
        self.asked.append(version.version)
        if self._failures:
            raise self._failures.pop(0)
        return version.version


def crew_of(folder: Path) -> Crew:
    config = parse(
        {
            "name": "one",
            "method": "opd",
            "student": {"model": "unused"},
            "teacher": {"kind": "server", "model": "unused"},
            "data": {"kind": "jsonl", "path": "unused"},
            "rollout": {"prompts_per_step": 1, "sampling": {"max_new_tokens": 1}},
            "optim": {"lr": 1e-3},
            "loop": {"steps": 3},
        }
    )
    return Crew(
        config,
        learners=Learners([Wire().handle(LearningActor())]),
        roster=Roster(hire_nobody, lose_nobody, wanted=1, at_least=1, restarts=0),
        published=published(0),
        journal=Journal(folder / "run"),
        teachers=[],
    )


async def hire_nobody(number: int, anew: bool) -> Worker:
    raise AssertionError(number)


def lose_nobody(number: int, error: WorkerLost) -> None:
    raise AssertionError(number)


def events(folder: Path) -> list[str]:
    return [event["type"] for event in read_jsonl(folder / "run" / "events.jsonl")]


def worker_of(actor: LoadingActor) -> Worker:
    return Worker(number=0, actor=Wire().handle(actor), version=0)


async def test_a_worker_follows_each_version_once(tmp_path: Path):
    crew, actor = crew_of(tmp_path), LoadingActor()
    worker = worker_of(actor)
    following = asyncio.create_task(crew.follow(worker))
    await asyncio.sleep(0.01)
    assert not following.done()
    for version in (1, 2):
        await crew.publish()
        await following
        assert worker.version == version
        following = asyncio.create_task(crew.follow(worker))
    following.cancel()
    assert actor.asked == [1, 2]


async def test_a_version_that_was_overwritten_leaves_the_worker_where_it_was(tmp_path: Path):
    crew, actor = crew_of(tmp_path), LoadingActor(StaleWeights("its bytes are gone"))
    worker = worker_of(actor)
    await crew.publish()
    await crew.follow(worker)
    assert worker.version == 0
    await crew.publish()
    await crew.follow(worker)
    assert (worker.version, actor.asked) == (2, [1, 2])


async def test_a_teacher_that_follows_and_is_away_is_waited_for_and_gets_the_newest(tmp_path: Path):
    crew, actor = crew_of(tmp_path), LoadingActor(TeacherUnavailable("503 from the teacher"))
    worker = worker_of(actor)
    await crew.publish()
    following = asyncio.create_task(crew.follow(worker))
    while not actor.asked:
        await asyncio.sleep(0.01)
    await crew.publish()
    await asyncio.wait_for(following, 10)
    assert (worker.version, actor.asked) == (2, [1, 2])
    assert events(tmp_path) == ["teacher.away", "teacher.back"]


async def test_damaged_weights_are_raised(tmp_path: Path):
    crew = crew_of(tmp_path)
    await crew.publish()
    with pytest.raises(WeightsError, match="damaged"):
        await crew.follow(worker_of(LoadingActor(WeightsError("damaged"))))
