"""What only a teacher may read stays with it: a run with canaries in its privileged text, and everything it leaves.

A whole run of real parts in one process; only the learner is a stand-in that learns nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.patience import Patience
from orchestrator.report import write_report
from orchestrator.roster import Worker
from orchestrator.run import execute
from orchestrator.teachers import Faculty
from potstill import bundles, spool
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import TeacherError
from potstill.fencing import Fence
from potstill.journal import Journal
from potstill.types import Bundle, Prompt, Receipt, StartingPoint, StepBatch, StepReport, WeightsVersion
from rollout_worker.actor import described, receipt_of
from rollout_worker.opening import Opened, open_worker
from tests.chat_server import chat_server, says
from tests.endpoints import Said
from tests.tiny_models import save_tiny_model

FOREVER_S = 3600.0
ANSWER, SOLUTION = "CANARY-answer-of-the-data-4711", "CANARY-solution-of-the-data-4712"
TEMPLATE, ADVICE = "CANARY-text-of-the-template-4713", "CANARY-advice-of-the-box-4714"
CANARIES = (ANSWER, SOLUTION, TEMPLATE, ADVICE)


class Crew:
    """One rollout worker in this process, and a learner that learns nothing."""

    calls = 1

    def __init__(self, opened: Opened, fence: Fence, patience: Patience) -> None:
        self._opened = opened
        self._fence = fence
        self._patience = patience
        self._checkpoints: list[str] = []

    async def arrivals(self) -> AsyncIterator[Worker]:
        yield Worker(number=0, actor=None, version=0)
        await asyncio.sleep(FOREVER_S)

    async def rollout(self, worker: Worker, chunk: range, prompts: Sequence[Prompt]) -> list[list[Receipt]]:
        collected = await self._patience.wait_out(lambda: self._opened.collector.collect(prompts))
        bundle = Bundle(ref=None, path=str(spool.path_of(self._fence.folder / "rollouts", chunk)))
        receipts = [receipt_of(collected, n, bundle, repetition=1.0) for n in range(len(collected.scored))]
        groups = [[receipt for receipt in receipts if receipt.prompt_id == prompt.id] for prompt in prompts]
        written = dict(zip(chunk, groups, strict=True))
        spool.write(self._fence.folder / "rollouts", collected.scored, written, self._fence)
        return groups

    async def follow(self, worker: Worker) -> None:
        await asyncio.sleep(FOREVER_S)

    async def pulse(self, worker: Worker) -> None:
        await asyncio.sleep(FOREVER_S)

    async def watch(self) -> None:
        await asyncio.sleep(FOREVER_S)

    async def step(self, batch: StepBatch) -> StepReport:
        self._step = batch.step
        return StepReport(step=batch.step, metrics={"loss": 1.0}, seconds={})

    async def publish(self) -> int:
        return self._step

    async def evaluate(self, prompts: Sequence[Prompt], who: Any) -> list[Any]:
        return [await self._opened.collector.evaluate(prompts, who)]

    async def describe(self, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        return [described(scored, self._opened.tokenizer.decode) for scored in bundles.rollouts(receipts)]

    async def spent(self) -> dict[str, Any]:
        return {"worker-0": self._opened.spent()}

    async def save(self, folder: Path, *, card: str, extra: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True)
        (folder / "card.md").write_text(card + json.dumps(extra))
        self._checkpoints.append(str(folder))

    async def saved(self) -> list[str]:
        return self._checkpoints


class Site:
    @contextlib.asynccontextmanager
    async def open(
        self, config: RunConfig, faculty: Faculty, fence: Fence, journal: Journal
    ) -> AsyncIterator[tuple[Crew, StartingPoint]]:
        opened = await open_worker(config, faculty.accesses, faculty.met, 0)
        version = WeightsVersion(version=0, digest="", checksums=(), tensors=(), payload=None)
        try:
            crew = Crew(opened, fence, Patience(journal, limit_s=config.loop.teacher_wait_s))
            yield crew, StartingPoint(published=version, extra={}, damaged=())
        finally:
            await opened.close()


def make_config(folder: Path, url: str) -> RunConfig:
    row = {"prompt": "12 + 9 = ?", "answer": ANSWER, "solution": SOLUTION}
    (folder / "data.jsonl").write_text((json.dumps(row) + "\n") * 6)
    advisor = {"url": url, "model": "m", "instruction": "{prompt} {solution}", "answers": str(folder / "kept.sqlite")}
    template = f"{{prompt}} {TEMPLATE} {{answer}} {{solution}} {{advice}}"
    return parse(
        {
            "name": "one",
            "runs": str(folder / "runs"),
            "method": "opsd",
            "student": {"model": str(save_tiny_model(folder / "model", seed=0))},
            "teacher": {"kind": "self", "privileged_template": template, "advisor": advisor},
            "data": {"kind": "jsonl", "path": str(folder / "data.jsonl"), "holdout": 2, "verifier": "exact"},
            "rollout": {
                "prompts_per_step": 2,
                "max_prompt_tokens": 384,
                "view": "privileged",
                "sampling": {"max_new_tokens": 3},
            },
            "optim": {"lr": 1e-4},
            "loop": {"steps": 2, "max_staleness": 1, "teacher_wait_s": 0},  # its learner never gives it new weights
            "eval": {"items": 2},
        }
    )


async def run(folder: Path, answer: Any) -> tuple[Path, list[str]]:
    """The run's folder, and what the advisor was asked."""
    with chat_server(answer) as server:
        config = make_config(folder, server.url)
        journal = Journal(folder / "runs" / "one")
        try:
            await execute(config, Site(), journal)  # type: ignore[arg-type]
        finally:
            journal.close()
            write_report(journal.folder)
    return journal.folder, server.questions


def check_no_canary(place: Path, *elsewhere: str) -> None:
    """Only the config may hold the template, and the page that shows it: it is the user's own setting."""
    files = [file for file in place.rglob("*") if file.is_file()]
    assert files
    texts = {file.name: file.read_bytes().decode(errors="replace") for file in files}
    texts |= {f"elsewhere {number}": text for number, text in enumerate(elsewhere)}
    for name, text in texts.items():
        known = {TEMPLATE} if name in {"config.json", "report.html"} else set()
        assert not [canary for canary in CANARIES if canary in text and canary not in known], name


async def test_what_only_the_teacher_reads_is_nowhere_in_what_a_run_leaves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    place, questions = await run(tmp_path, lambda text: says(ADVICE))
    assert questions == [f"12 + 9 = ? {SOLUTION}"]
    samples = (place / "samples.jsonl").read_text()
    assert "12 + 9 = ?" in samples
    assert "the teacher's own prompt, which is not shown" in samples
    assert json.loads((place / "report.json").read_text())["teacher_spent"]["advisor"]["requests"] == 1
    assert {"config.json", "events.jsonl", "metrics.jsonl", "report.html"} <= {file.name for file in place.iterdir()}
    check_no_canary(place, *capfd.readouterr(), caplog.text)


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_a_failing_api_that_repeats_what_it_was_sent_is_not_repeated(
    status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    def answer(text: str) -> Said:
        said = f"cannot read: {text!r}"
        return status, {"error": {"message": said, "param": text, "code": text}}

    caplog.set_level(logging.DEBUG)
    with pytest.raises(TeacherError, match=f"{status}: cannot read:") as caught:
        await run(tmp_path, answer)
    check_no_canary(tmp_path / "runs", repr(caught.value), *capfd.readouterr(), caplog.text)
