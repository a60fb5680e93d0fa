"""The processes of a run, behind the verbs that the loop uses.

Every failure of a process comes out as one of potstill's errors, with the cause that the process itself named. What
only takes another worker is mended in here; for a learner or a teacher run.py begins another attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from orchestrator.learners import LEARNER, Learners
from orchestrator.outcome import died, outcome, revocable
from orchestrator.patience import Patience
from orchestrator.pulse import actor_pulse, server_pulse
from orchestrator.roster import Roster, Worker
from orchestrator.tasks import together, until
from potstill.config import RunConfig
from potstill.errors import LearnerLost, StaleWeights, WorkerLost
from potstill.journal import Journal
from potstill.processes import Child
from potstill.types import Prompt, Receipt, StepBatch, StepReport, WeightsVersion

CANARY_ROLLOUTS = 4
WORKER = "rollout worker"
WRITES_ITSELF = frozenset({"student", "handoff", "revision"})  # sources whose text is of the student's newest weights
RETRY_S = 0.2  # until a version that was overwritten while it was read has a successor

Answer = TypeVar("Answer")


class Crew:
    """One learner, its rollout workers, and the teachers that the run started. Made by launch.py, for one attempt."""

    def __init__(
        self,
        config: RunConfig,
        *,
        learners: Learners,
        roster: Roster,
        published: WeightsVersion,
        journal: Journal,
        teachers: Sequence[Child],
    ) -> None:
        self._config = config
        self._learners = learners
        self._roster = roster
        self._published = published
        self._journal = journal
        self._patience = Patience(journal, limit_s=config.loop.teacher_wait_s)
        self._teachers = teachers
        self._newer = asyncio.Event()

    @property
    def calls(self) -> int:
        """Chunks that one worker has at once."""
        return self._config.rollout.calls or (1 if self._config.loop.max_staleness == 0 else 2)

    def arrivals(self) -> AsyncIterator[Worker]:
        return self._roster.arrivals()

    def lost(self, worker: Worker, error: WorkerLost) -> None:
        """Have another come in its place."""
        self._roster.lost(worker, error)

    async def rollout(self, worker: Worker, chunk: range, prompts: Sequence[Prompt]) -> list[list[Receipt]]:
        """Receipts by prompt, written and scored by one worker with the weights that it has now, or newer ones."""
        version = worker.version
        groups: list[list[Receipt]] = await self._patience.wait_out(
            lambda: revocable(WORKER, worker.actor.rollout.remote(chunk, prompts, version))
        )
        self._roster.worked(worker)
        return groups

    async def follow(self, worker: Worker) -> None:
        """Wait for weights that are newer than the worker's, and have it load the newest; a teacher that follows the
        student and is away meanwhile is waited for."""
        while worker.version >= self._published.version:
            await self._newer.wait()
        async with worker.loading:
            if worker.version < self._published.version:
                worker.version = await self._patience.wait_out(lambda: self._loaded(worker, self._published))

    async def pulse(self, worker: Worker) -> None:
        """Raises WorkerLost when the worker has given no sign of life for too long, and ends it."""
        await actor_pulse(worker.name, worker.actor, self._config.loop.silence_s, WorkerLost)

    async def watch(self) -> None:
        """Raises LearnerLost or WorkerLost when the learner or a teacher that the run started is gone or silent."""
        silence_s = self._config.loop.silence_s
        learners = [actor_pulse(LEARNER, actor, silence_s, LearnerLost) for actor in self._learners.actors]
        servers = [server_pulse(child, silence_s) for child in self._teachers]
        await together(*learners, *servers, *(died(child) for child in self._teachers))

    async def check(self, batch: StepBatch) -> dict[str, float]:
        found: dict[str, float] = await self._learners.all("check", batch, CANARY_ROLLOUTS)
        return found

    async def step(self, batch: StepBatch) -> StepReport:
        report: StepReport = await self._learners.all("step", batch)
        return report

    async def publish(self) -> int:
        """Put the learner's weights where workers can fetch them; returns their version."""
        self._published = await self._learners.all("publish")
        self._newer.set()
        self._newer = asyncio.Event()
        return self._published.version

    async def evaluate(self, prompts: Sequence[Prompt], who: Literal["student", "teacher"]) -> list[Any]:
        """Verdicts on parts of the prompts, by the workers; the student with the learner's newest weights."""
        present = max(1, len(self._roster.present))
        parts = [part for part in (prompts[number::present] for number in range(present)) if part]

        async def evaluated(worker: Worker, part: Sequence[Prompt]) -> Any:
            await self._catch_up(worker)
            return await outcome(WORKER, worker.actor.evaluate.remote(part, who))

        return await together(
            *[
                self._by_somebody(number, lambda worker, part=part: evaluated(worker, part))  # type: ignore[misc]
                for number, part in enumerate(parts)
            ]
        )

    async def describe(self, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        """The rollouts as text, token by token; a self-teacher's log-probs come from the learner, which holds it."""
        records: list[dict[str, Any]] = await self._ask("describe", receipts)
        annotations = await self._learners.all("annotate", receipts)
        for record, annotation in zip(records, annotations, strict=True):
            for token, logprob in zip(record["tokens"], annotation or (), strict=annotation is not None):
                token["teacher_logprob"] = logprob
        return records

    async def completions(self, receipts: Sequence[Receipt]) -> list[list[int]]:
        """Token ids, for texts that are to be learnt again."""
        found: list[list[int]] = await self._ask("completions", receipts)
        return found

    async def given(self, prompts: Sequence[Prompt]) -> list[Receipt]:
        """The data's own solutions of prompts outside the run's stream, as rollouts."""
        found: list[Receipt] = await self._ask("given", prompts)
        return found

    async def validate(self, receipts: Sequence[Receipt]) -> float:
        """The objective on these rollouts, of the learner's newest weights; nothing is learnt from them."""
        loss: float = await self._learners.all("validate", receipts)
        return loss

    async def spent(self) -> dict[str, dict[str, Any]]:
        """By worker, what a paid teacher was asked and what it cost; empty where nobody is paid."""
        asked = [until(outcome(WORKER, w.actor.spent.remote()), self.pulse(w)) for w in self._roster.present]
        return {f"worker-{number}": totals for number, totals in enumerate(await together(*asked)) if totals}

    async def save(self, folder: Path, *, card: str, extra: dict[str, Any]) -> None:
        """Have the learner copy all that decides its next number, and begin to write it; waits for an earlier one."""
        await self._learners.all("save", str(folder), card, extra)

    async def saved(self) -> list[str]:
        """Wait until what was saved last is durable. Returns the checkpoints that are on disk now."""
        kept: list[str] = await self._learners.first("saved")
        return kept

    async def close(self) -> None:
        await self._roster.close()

    async def _catch_up(self, worker: Worker) -> None:
        """As `follow`, also where a run's text is of weights that never change."""
        async with worker.loading:
            if worker.version < self._published.version or not self._writes_itself:
                worker.version = await self._load(worker, self._published)

    async def _loaded(self, worker: Worker, version: WeightsVersion) -> int:
        return await self._load(worker, version) if self._writes_itself else version.version

    async def _load(self, worker: Worker, version: WeightsVersion) -> int:
        """The version that the worker then has: an older one where this one was overwritten before it was read."""
        try:
            loaded: int = await outcome(WORKER, worker.actor.load_weights.remote(version))
        except StaleWeights:
            await asyncio.sleep(RETRY_S)
            return worker.version
        return loaded

    @property
    def _writes_itself(self) -> bool:
        return self._config.rollout.source in WRITES_ITSELF

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Have any worker do it."""
        return await self._by_somebody(
            0, lambda worker: outcome(WORKER, getattr(worker.actor, method).remote(*arguments))
        )

    async def _by_somebody(self, number: int, job: Callable[[Worker], Coroutine[Any, Any, Answer]]) -> Answer:
        """The job done by one of the workers, and by another where that one is lost."""
        while True:
            await self._roster.somebody()
            present = self._roster.present
            worker = present[number % len(present)]
            try:
                return await until(self._patience.wait_out(partial(job, worker)), self.pulse(worker))
            except WorkerLost as error:
                self.lost(worker, error)
