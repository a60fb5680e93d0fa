"""Chores that are under way when the run is asked to stop: a crew that never ends what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from orchestrator.buffer import Closed
from orchestrator.chores import Chores
from orchestrator.recorder import Recorder
from potstill.config_file import parse
from potstill.environments import open_environment
from potstill.journal import Journal
from potstill.types import StepBatch
from tests.receipts import make_receipt

FOREVER_S = 3600.0


class BusyCrew:
    """`asked` is what it was asked, and is at."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def check(self, batch: StepBatch) -> dict[str, float]:
        return await self._work("check")

    async def evaluate(self, prompts: Any, who: str) -> list[Any]:
        return await self._work(f"evaluate {who}")

    async def _work(self, what: str) -> Any:
        self.asked.append(what)
        await asyncio.sleep(FOREVER_S)


def chores_of(folder: Path, crew: BusyCrew, stopping: asyncio.Event) -> Chores:
    (folder / "data.jsonl").write_text('{"prompt": "2 + 2 = ?", "answer": "4"}\n' * 4)
    config = parse(
        {
            "name": "one",
            "method": "opd",
            "student": {"model": "unused"},
            "teacher": {"kind": "server", "model": "unused"},
            "data": {"kind": "jsonl", "path": str(folder / "data.jsonl"), "holdout": 2},
            "rollout": {"prompts_per_step": 1, "sampling": {"max_new_tokens": 1}},
            "optim": {"lr": 1e-3},
            "loop": {"steps": 3},
            "eval": {"items": 2},
        }
    )
    journal = Journal(folder / "run")
    return Chores(
        config,
        crew=crew,  # type: ignore[arg-type]
        journal=journal,
        recorder=Recorder(journal=journal, config=config.loop),
        data=open_environment(config.data),
        offpolicy=None,
        stopping=stopping,
    )


BATCH = StepBatch(step=1, receipts=(make_receipt(0),), num_loss_tokens=5, num_sequences=1, oldest_version=0)


@pytest.mark.parametrize(
    ("chore", "asked"),
    [
        (lambda chores: chores.before({}), "evaluate student"),
        (lambda chores: chores.canaries(BATCH), "check"),
        (lambda chores: chores.after([range(1)]), "evaluate student"),
    ],
    ids=["before", "canaries", "after"],
)
async def test_a_run_that_is_asked_to_stop_waits_for_no_evaluation_and_no_canary(
    tmp_path: Path, chore: Callable[[Chores], Coroutine[Any, Any, None]], asked: str
):
    crew, stopping = BusyCrew(), asyncio.Event()
    doing = asyncio.create_task(chore(chores_of(tmp_path, crew, stopping)))
    while not crew.asked:
        await asyncio.sleep(0.001)
    stopping.set()
    with pytest.raises(Closed):
        await asyncio.wait_for(doing, 5)
    assert crew.asked == [asked]
