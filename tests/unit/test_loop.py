"""The loop's order of verbs, its end, its failures and its losses, with a crew that only notes what it was asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.buffer import Buffer, Closed
from orchestrator.loop import distil
from orchestrator.prompts import PromptStream
from orchestrator.recorder import Recorder
from orchestrator.roster import Roster, Worker
from potstill.config import JsonlData, LoopConfig
from potstill.environments import open_environment
from potstill.errors import NonFinite, RunError, SignalLost, WeightsError, WorkerLost
from potstill.journal import Journal, read_jsonl
from potstill.types import Prompt, Receipt, StepBatch, StepReport
from tests.receipts import make_receipt

FOREVER_S = 3600.0


class NotingCrew:
    """A crew without processes: `notes` is what happened, in order.

    A verb of `failures` raises each of its errors once, in turn; a verb of `stuck` never ends.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        calls: int = 1,
        failures: dict[str, list[Exception]] | None = None,
        stuck: set[str] | None = None,
    ) -> None:
        self.calls = calls
        self.notes: list[str] = []
        self.made = self.version = 0
        self.in_flight = self.most_in_flight = 0
        self.roster = Roster(self._hire, self._lose, wanted=workers, at_least=workers, restarts=2)
        self._hired: Counter[int] = Counter()
        self._newer = asyncio.Event()
        self._failures = failures or {}
        self._stuck = stuck or set()

    async def _hire(self, number: int, anew: bool) -> Worker:
        self._hired[number] += 1
        return Worker(number=number, actor=f"{number}.{self._hired[number]}", version=0)

    def arrivals(self) -> AsyncIterator[Worker]:
        return self.roster.arrivals()

    def _lose(self, number: int, error: WorkerLost) -> None:
        self.notes.append(f"lost {number}.{self._hired[number]}")

    def lost(self, worker: Worker, error: WorkerLost) -> None:
        self.roster.lost(worker, error)

    async def rollout(self, worker: Worker, chunk: range, prompts: Sequence[Prompt]) -> list[list[Receipt]]:
        version = worker.version
        self.notes.append(f"{worker.actor} begins {[*chunk]} with version {version}")
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        try:
            await self._happens(f"rollout {worker.actor}", 0.002)
        finally:
            self.in_flight -= 1
        self.roster.worked(worker)
        self.notes.append(f"{worker.actor} ends {[*chunk]}")
        return [[make_receipt(prompt, version=version)] for prompt in chunk]

    async def follow(self, worker: Worker) -> None:
        while worker.version >= self.version:
            await self._newer.wait()
        version = self.version
        await self._happens(f"follow {worker.actor}", 0.001)
        worker.version = version
        self.notes.append(f"{worker.actor} loads {version}")

    async def pulse(self, worker: Worker) -> None:
        while True:
            await self._happens(f"pulse {worker.actor}", 0.001)

    async def step(self, batch: StepBatch) -> StepReport:
        self.notes.append(f"step {batch.step} begins")
        await self._happens(f"step {batch.step}", 0.01)
        self.notes.append(f"step {batch.step} ends")
        self.made = batch.step
        return StepReport(step=batch.step, metrics={"loss": 1.0 / batch.step}, seconds={})

    async def publish(self) -> int:
        self.version = self.made
        self.notes.append(f"publish {self.version}")
        self._newer.set()
        self._newer = asyncio.Event()
        return self.version

    async def _happens(self, verb: str, seconds: float) -> None:
        await asyncio.sleep(FOREVER_S if verb in self._stuck else seconds)
        if self._failures.get(verb):
            raise self._failures[verb].pop(0)

    def place(self, note: str) -> int:
        return self.notes.index(note)

    def begun(self) -> list[str]:
        return [note for note in self.notes if " begins [" in note]


class NotingChores:
    def __init__(self, crew: NotingCrew) -> None:
        self._crew = crew
        self.trained: Sequence[range] = ()

    async def canaries(self, batch: StepBatch) -> None:
        self._crew.notes.append(f"canaries {batch.step}")

    async def after_step(self, batch: StepBatch, trained: Sequence[range]) -> None:
        self._crew.notes.append(f"chores {batch.step}")
        self.trained = trained


def make_buffer(*, steps: int = 2, B: int = 2, C: int = 2, version: int = 0, **loop: Any) -> Buffer:
    return Buffer(LoopConfig(steps=steps, **loop), prompts_per_step=B, prompts_per_call=C, version=version)


async def run(
    folder: Path, crew: NotingCrew, buffer: Buffer, *, steps: int = 2, B: int = 2, **loop: Any
) -> tuple[Recorder, NotingChores]:
    """Distil with `crew`, and see that no task outlives the call."""
    (folder / "data.jsonl").write_text('{"prompt": "a"}\n')
    environment = open_environment(JsonlData(path=str(folder / "data.jsonl")))
    recorder = Recorder(journal=Journal(folder / "run"), config=LoopConfig(steps=steps, **loop))
    prompts, chores = PromptStream(environment, seed=0, prompts_per_step=B), NotingChores(crew)
    await crew.roster.open()
    before = asyncio.all_tasks()
    try:
        await asyncio.wait_for(
            distil(crew, prompts, buffer, recorder, chores),  # type: ignore[arg-type]
            20,
        )
    finally:
        await crew.roster.close()
        assert asyncio.all_tasks() <= before
        assert crew.in_flight == 0
    return recorder, chores


async def run_with(folder: Path, crew: NotingCrew, *, steps: int = 2, B: int = 2, C: int = 2, **loop: Any) -> Recorder:
    """Distil from the start; every prompt is trained once."""
    recorder, chores = await run(folder, crew, make_buffer(steps=steps, B=B, C=C, **loop), steps=steps, B=B, **loop)
    trained = [prompt for line in read_jsonl(folder / "run" / "ledger.jsonl") for prompt in line["prompts"]]
    assert len(set(trained)) == len(trained) == B * recorder.steps_done
    assert sum(len(some) for some in chores.trained) == len(trained)
    return recorder


async def test_without_staleness_the_verbs_follow_each_other(tmp_path: Path):
    crew = NotingCrew()
    await run_with(tmp_path, crew, steps=2, max_staleness=0)
    assert [note for note in crew.notes if not note.startswith("chores")] == [
        "0.1 begins [0, 1] with version 0",
        "0.1 ends [0, 1]",
        "canaries 1",
        "step 1 begins",
        "step 1 ends",
        "publish 1",
        "0.1 loads 1",
        "0.1 begins [2, 3] with version 1",
        "0.1 ends [2, 3]",
        "canaries 2",
        "step 2 begins",
        "step 2 ends",
        "publish 2",
    ]
    assert crew.place("publish 1") < crew.place("chores 1") < crew.place("step 2 begins")
    assert crew.notes[-1] == "chores 2"


async def test_with_staleness_one_the_next_rollouts_are_written_while_a_step_is_in_progress(tmp_path: Path):
    crew = NotingCrew()
    await run_with(tmp_path, crew, steps=3, max_staleness=1)
    assert crew.place("step 1 begins") < crew.place("0.1 ends [2, 3]") < crew.place("step 1 ends")
    assert crew.place("step 2 begins") < crew.place("0.1 ends [4, 5]") < crew.place("step 2 ends")


async def test_rollouts_go_on_while_weights_travel(tmp_path: Path):
    crew = NotingCrew(stuck={"follow 0.1"})
    await run_with(tmp_path, crew, steps=3, max_staleness=2)
    assert crew.begun() == [f"0.1 begins [{first}, {first + 1}] with version 0" for first in (0, 2, 4)]


async def test_each_worker_follows_at_its_own_pace(tmp_path: Path):
    crew = NotingCrew(workers=2, stuck={"follow 0.1"})
    await run_with(tmp_path, crew, steps=3, C=1)
    assert "0.1 begins [0] with version 0" in crew.begun()
    assert {note for note in crew.begun() if not note.endswith("version 0")} == {
        f"1.1 begins [{prompt}] with version {prompt // 2}" for prompt in range(2, 6)
    }


@pytest.mark.parametrize("calls", [1, 3])
async def test_a_worker_has_as_many_calls_at_once_as_it_should(tmp_path: Path, calls: int):
    crew = NotingCrew(calls=calls)
    await run_with(tmp_path, crew, steps=2, B=4, C=1)
    assert crew.most_in_flight == calls


async def test_every_worker_writes_and_batches_are_complete(tmp_path: Path):
    crew = NotingCrew(workers=3)
    recorder = await run_with(tmp_path, crew, steps=3, B=3, C=1)
    assert {note.split()[0] for note in crew.begun()} == {"0.1", "1.1", "2.1"}
    assert (recorder.steps_done, recorder.tokens_trained) == (3, 45)


async def test_every_step_has_one_line_of_metrics_with_its_version(tmp_path: Path):
    await run_with(tmp_path, NotingCrew(), steps=3)
    lines = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [(line["step"], line["weights_version"], line["loss"]) for line in lines] == [
        (1, 1, 1),
        (2, 2, 0.5),
        (3, 3, 1 / 3),
    ]
    assert all(line["seconds_train"] >= 0.01 and line["staleness_max"] == 0 for line in lines)


async def test_enough_tokens_end_training_and_generation_with_it(tmp_path: Path):
    crew = NotingCrew()
    recorder = await run_with(tmp_path, crew, steps=100, max_staleness=1, max_train_tokens=25)
    assert (recorder.steps_done, recorder.tokens_trained) == (3, 30)
    assert "step 4 begins" not in crew.notes


async def test_no_steps_is_no_work(tmp_path: Path):
    crew = NotingCrew()
    await run(tmp_path, crew, make_buffer(steps=0), steps=0)
    assert crew.notes == []


# ---------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("verb", ["rollout", "follow", "pulse"])
async def test_what_a_lost_worker_was_writing_another_writes(tmp_path: Path, verb: str):
    """It is lost in the middle of a call, while it loads weights, or because it is silent."""
    crew = NotingCrew(workers=2, calls=2, failures={f"{verb} 0.1": [WorkerLost("killed")]})
    await run_with(tmp_path, crew, steps=3, B=4, C=1, max_staleness=1)
    assert crew.notes.count("lost 0.1") == 1
    assert not any(note.startswith("0.1") for note in crew.notes[crew.place("lost 0.1") :])


async def test_a_run_whose_only_worker_is_lost_goes_on_with_the_next_one_and_the_newest_weights(tmp_path: Path):
    crew = NotingCrew(failures={"follow 0.1": [WorkerLost("killed")]})
    await run_with(tmp_path, crew, steps=2)
    assert crew.begun() == ["0.1 begins [0, 1] with version 0", "0.2 begins [2, 3] with version 1"]
    assert crew.place("lost 0.1") < crew.place("0.2 loads 1") < crew.place("0.2 begins [2, 3] with version 1")


async def test_a_frozen_workers_call_is_not_waited_for(tmp_path: Path):
    crew = NotingCrew(stuck={"rollout 0.1"}, failures={"pulse 0.1": [WorkerLost("silent")]})
    await run_with(tmp_path, crew, steps=1)
    assert crew.begun() == [f"0.{hired} begins [0, 1] with version 0" for hired in (1, 2)]


async def test_workers_that_are_lost_again_and_again_end_the_run(tmp_path: Path):
    crew = NotingCrew(failures={f"rollout 0.{hired}": [WorkerLost("no memory")] for hired in (1, 2, 3)})
    with pytest.raises(WorkerLost, match="lost 3 times in a row: no memory"):
        await run_with(tmp_path, crew)


# ---------------------------------------------------------------------------------------------- failures and ends


@pytest.mark.parametrize(
    ("verb", "error"),
    [
        ("rollout 1.1", ValueError("a bug")),
        ("follow 0.1", WeightsError("damaged")),
        ("step 1", NonFinite("step 1: the loss is NaN")),
        ("step 2", SignalLost("step 2")),
        ("step 1", WorkerLost("the learner's process died")),
    ],
)
async def test_the_first_failure_ends_the_run_with_its_own_error(tmp_path: Path, verb: str, error: Exception):
    crew = NotingCrew(workers=2, failures={verb: [error]})
    with pytest.raises(type(error)) as caught:
        await run_with(tmp_path, crew, steps=5, C=1, max_staleness=1)
    assert caught.value is error


async def test_a_failing_worker_is_noticed_while_the_other_one_is_busy(tmp_path: Path):
    crew = NotingCrew(workers=2, stuck={"rollout 0.1"}, failures={"rollout 1.1": [RunError("out of memory")]})
    with pytest.raises(RunError, match="out of memory"):
        await run_with(tmp_path, crew, C=1)


async def test_a_run_that_is_asked_to_stop_ends_after_the_step_that_it_is_in(tmp_path: Path):
    crew, buffer = NotingCrew(), make_buffer(steps=9, max_staleness=1)
    running = asyncio.create_task(run(tmp_path, crew, buffer, steps=9))
    while "step 2 begins" not in crew.notes:
        await asyncio.sleep(0.001)
    buffer.close()
    with pytest.raises(Closed):
        await running
    assert "chores 2" in crew.notes
    assert "step 3 begins" not in crew.notes
    assert buffer.trained == [range(4)]


async def test_a_run_that_waits_for_rollouts_is_stopped_at_once(tmp_path: Path):
    crew, buffer = NotingCrew(stuck={"rollout 0.1"}), make_buffer()
    running = asyncio.create_task(run(tmp_path, crew, buffer))
    while not crew.begun():
        await asyncio.sleep(0.001)
    buffer.close()
    with pytest.raises(Closed):
        await asyncio.wait_for(running, 5)


async def test_a_cancelled_run_leaves_no_task(tmp_path: Path):
    crew = NotingCrew(stuck={"step 1"})
    running = asyncio.create_task(run(tmp_path, crew, make_buffer(max_staleness=1)))
    while "step 1 begins" not in crew.notes:
        await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() == {asyncio.current_task()}
