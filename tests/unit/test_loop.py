"""The loop's order of verbs, its end and its failures, with a crew that only notes what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.buffer import Buffer
from orchestrator.loop import distil
from orchestrator.prompts import PromptStream
from orchestrator.recorder import Recorder
from potstill.config import JsonlData, LoopConfig
from potstill.environments import open_environment
from potstill.errors import NonFinite, RunError, SignalLost, WorkerLost
from potstill.journal import Journal, read_jsonl
from potstill.types import Prompt, Receipt, StepBatch, StepReport
from tests.receipts import make_receipt

FOREVER_S = 3600.0


class NotingCrew:
    """A crew without processes: `notes` is what happened, in order. A verb of `failures` raises when it is asked."""

    def __init__(self, *, workers: int = 1, share: int = 2, failures: dict[str, Exception] | None = None) -> None:
        self.num_workers = workers
        self.share = share
        self.notes: list[str] = []
        self.version = 0
        self.in_flight = 0
        self._failures = failures or {}

    async def rollout(self, worker: int, prompts: Sequence[Prompt]) -> list[list[Receipt]]:
        numbers = [prompt.index for prompt in prompts]
        self.notes.append(f"rollout {numbers} by version {self.version}")
        self.in_flight += 1
        try:
            await asyncio.sleep(0.001)
            self._fail(f"rollout {worker}")
        finally:
            self.in_flight -= 1
        self.notes.append(f"rolled {numbers}")
        return [[make_receipt(prompt.index, version=self.version)] for prompt in prompts]

    async def teacher_lost(self) -> None:
        if "teacher" not in self._failures:
            await asyncio.sleep(FOREVER_S)
        await asyncio.sleep(0.005)
        self._fail("teacher")

    async def step(self, batch: StepBatch) -> StepReport:
        self.notes.append(f"step {batch.step} begins")
        await asyncio.sleep(0.01)
        self._fail(f"step {batch.step}")
        self.notes.append(f"step {batch.step} ends")
        self.version = batch.step
        return StepReport(step=batch.step, metrics={"loss": 1.0 / batch.step}, seconds={})

    async def publish(self) -> int:
        self.notes.append(f"publish {self.version}")
        return self.version

    def _fail(self, verb: str) -> None:
        if verb in self._failures:
            raise self._failures[verb]


class NotingChores:
    def __init__(self, crew: NotingCrew) -> None:
        self._crew = crew

    async def canaries(self, batch: StepBatch) -> None:
        self._crew.notes.append(f"canaries {batch.step}")

    async def after_step(self, batch: StepBatch) -> None:
        self._crew.notes.append(f"chores {batch.step}")


async def run(
    folder: Path, crew: NotingCrew, *, steps: int = 2, S: int = 0, B: int = 2, max_train_tokens: int | None = None
) -> Recorder:
    """Distil with `crew`, and see that no task outlives the call."""
    (folder / "data.jsonl").write_text('{"prompt": "a"}\n')
    environment = open_environment(JsonlData(path=str(folder / "data.jsonl")))
    config = LoopConfig(steps=steps, max_staleness=S, max_train_tokens=max_train_tokens)
    recorder = Recorder(journal=Journal(folder / "run"), config=config)
    buffer = Buffer(prompts_per_step=B, steps=steps, max_staleness=S, max_unscored_fraction=0.0, version=0)
    prompts = PromptStream(environment, seed=0, prompts_per_step=B)
    before = asyncio.all_tasks()
    try:
        await asyncio.wait_for(
            distil(crew, prompts, buffer, recorder, NotingChores(crew)),  # type: ignore[arg-type]
            20,
        )
    finally:
        assert asyncio.all_tasks() == before
        assert crew.in_flight == 0
    return recorder


async def test_without_staleness_the_verbs_follow_each_other(tmp_path: Path):
    crew = NotingCrew()
    await run(tmp_path, crew, steps=2, S=0)
    assert [note for note in crew.notes if not note.startswith("chores")] == [
        "rollout [0, 1] by version 0",
        "rolled [0, 1]",
        "canaries 1",
        "step 1 begins",
        "step 1 ends",
        "publish 1",
        "rollout [2, 3] by version 1",
        "rolled [2, 3]",
        "canaries 2",
        "step 2 begins",
        "step 2 ends",
        "publish 2",
    ]
    assert crew.notes.index("publish 1") < crew.notes.index("chores 1") < crew.notes.index("step 2 begins")
    assert crew.notes[-1] == "chores 2"


async def test_with_staleness_one_the_next_rollouts_are_written_while_a_step_is_in_progress(tmp_path: Path):
    crew = NotingCrew()
    await run(tmp_path, crew, steps=3, S=1)
    order = {note: number for number, note in enumerate(crew.notes)}
    assert order["rollout [2, 3] by version 0"] < order["step 1 begins"]
    assert order["step 2 begins"] < order["rolled [4, 5]"] < order["step 2 ends"]


async def test_every_worker_writes_and_batches_are_complete(tmp_path: Path):
    crew = NotingCrew(workers=3, share=1)
    recorder = await run(tmp_path, crew, steps=3, B=3, S=0)
    written = sorted(note for note in crew.notes if note.startswith("rollout"))
    assert written == sorted(f"rollout [{prompt}] by version {prompt // 3}" for prompt in range(9))
    assert (recorder.steps_done, recorder.tokens_trained) == (3, 45)


async def test_every_step_has_one_line_of_metrics_with_its_version(tmp_path: Path):
    await run(tmp_path, NotingCrew(), steps=3)
    lines = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [(line["step"], line["weights_version"], line["loss"]) for line in lines] == [
        (1, 1, 1),
        (2, 2, 0.5),
        (3, 3, 1 / 3),
    ]
    assert all(line["seconds_train"] >= 0.01 and line["staleness_max"] == 0 for line in lines)


async def test_enough_tokens_end_training_and_generation_with_it(tmp_path: Path):
    crew = NotingCrew()
    recorder = await run(tmp_path, crew, steps=100, S=1, max_train_tokens=25)
    assert (recorder.steps_done, recorder.tokens_trained) == (3, 30)
    assert "step 4 begins" not in crew.notes


async def test_no_steps_is_no_work(tmp_path: Path):
    crew = NotingCrew()
    await run(tmp_path, crew, steps=0)
    assert crew.notes == []


@pytest.mark.parametrize(
    ("verb", "error"),
    [
        ("rollout 0", WorkerLost("the rollout worker's process died")),
        ("rollout 1", ValueError("a bug")),
        ("step 1", NonFinite("step 1: the loss is NaN")),
        ("step 2", SignalLost("step 2")),
        ("teacher", WorkerLost("the teacher server ended with exit code -9")),
    ],
)
async def test_the_first_failure_ends_the_run_with_its_own_error(tmp_path: Path, verb: str, error: Exception):
    crew = NotingCrew(workers=2, share=1, failures={verb: error})
    with pytest.raises(type(error)) as caught:
        await run(tmp_path, crew, steps=5, S=1)
    assert caught.value is error


async def test_a_failing_worker_is_noticed_while_the_other_one_is_busy(tmp_path: Path):
    class SlowCrew(NotingCrew):
        async def rollout(self, worker: int, prompts: Sequence[Prompt]) -> list[list[Receipt]]:
            if worker == 0:
                await asyncio.sleep(FOREVER_S)
            return await super().rollout(worker, prompts)

    crew = SlowCrew(workers=2, share=1, failures={"rollout 1": RunError("out of memory")})
    with pytest.raises(RunError, match="out of memory"):
        await run(tmp_path, crew)


async def test_a_cancelled_run_leaves_no_task(tmp_path: Path):
    class StuckCrew(NotingCrew):
        async def step(self, batch: StepBatch) -> StepReport:
            self.notes.append("stuck")
            await asyncio.sleep(FOREVER_S)
            return await super().step(batch)

    crew = StuckCrew()
    running = asyncio.create_task(run(tmp_path, crew))
    while "stuck" not in crew.notes:
        await asyncio.sleep(0.005)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() == {asyncio.current_task()}
