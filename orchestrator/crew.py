"""The processes of a run, behind the verbs that the loop uses. Ray stays in here and in launch.py.

Every failure of a process comes out as one of potstill's errors, with the cause that the process itself named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, Literal

from ray.exceptions import RayActorError, RayTaskError

from potstill.config import RunConfig
from potstill.errors import PotstillError, RunError, WorkerLost
from potstill.processes import Child
from potstill.types import Prompt, Receipt, StepBatch, StepReport, WeightsVersion

CANARY_ROLLOUTS = 4


class Crew:
    """One learner and its rollout workers, opened for one run, and the teachers that it started. Made by launch.py."""

    def __init__(
        self,
        config: RunConfig,
        *,
        learner: Any,
        workers: Sequence[Any],
        version: WeightsVersion,
        teachers: Sequence[Child],
    ) -> None:
        self._config = config
        self._learner = learner
        self._workers = workers
        self._teachers = teachers
        self._learner_version = version.version
        self._loaded_version = version.version

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    @property
    def share(self) -> int:
        """Prompts of one step that fall to one worker."""
        return -(-self._config.rollout.prompts_per_step // len(self._workers))

    async def rollout(self, worker: int, prompts: Sequence[Prompt]) -> list[list[Receipt]]:
        """Receipts by prompt, written and scored by one worker."""
        groups: list[list[Receipt]] = await outcome("rollout worker", self._workers[worker].rollout.remote(prompts))
        return groups

    async def teacher_lost(self) -> None:
        """Raises WorkerLost when a teacher that the run started dies, which workers would take for one that is slow."""
        await asyncio.gather(*(child.died() for child in self._teachers))

    async def check(self, batch: StepBatch) -> dict[str, float]:
        found: dict[str, float] = await outcome("learner", self._learner.check.remote(batch, CANARY_ROLLOUTS))
        return found

    async def step(self, batch: StepBatch) -> StepReport:
        report: StepReport = await outcome("learner", self._learner.step.remote(batch))
        self._learner_version = report.step
        return report

    async def publish(self) -> int:
        """The learner's version, loaded by every worker where the student itself writes; returns the version."""
        if self._config.rollout.source in {"student", "handoff"}:
            await self._load()
        return self._learner_version

    async def evaluate(self, prompts: Sequence[Prompt], who: Literal["student", "teacher"]) -> list[Any]:
        """Verdicts of each worker on its part of the prompts; the student with the learner's newest weights."""
        await self._load()
        parts = [prompts[w :: len(self._workers)] for w in range(len(self._workers))]
        asked = zip(self._workers, parts, strict=True)
        return await asyncio.gather(*[outcome("rollout worker", w.evaluate.remote(p, who)) for w, p in asked if p])

    async def describe(self, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        """The rollouts as text, token by token; a self-teacher's log-probs come from the learner, which holds it."""
        records: list[dict[str, Any]] = await outcome("rollout worker", self._workers[0].describe.remote(receipts))
        annotations = await outcome("learner", self._learner.annotate.remote(receipts))
        for record, annotation in zip(records, annotations, strict=True):
            for token, logprob in zip(record["tokens"], annotation or (), strict=annotation is not None):
                token["teacher_logprob"] = logprob
        return records

    async def completions(self, receipts: Sequence[Receipt]) -> list[list[int]]:
        """Token ids, for texts that are to be learnt again."""
        found: list[list[int]] = await outcome("rollout worker", self._workers[0].completions.remote(receipts))
        return found

    async def validate(self, receipts: Sequence[Receipt]) -> float:
        """The objective on these rollouts, of the learner's newest weights; nothing is learnt from them."""
        loss: float = await outcome("learner", self._learner.validate.remote(receipts))
        return loss

    async def spent(self) -> dict[str, dict[str, Any]]:
        """By worker, what a paid teacher was asked and what it cost; empty where nobody is paid."""
        found = await asyncio.gather(*[outcome("rollout worker", worker.spent.remote()) for worker in self._workers])
        return {f"worker-{number}": totals for number, totals in enumerate(found) if totals}

    async def save(self, folder: Path, *, card: str, extra: dict[str, Any]) -> None:
        saving = self._learner.save.remote(
            str(folder), card, self._config.student.model, extra, self._config.checkpoint.keep
        )
        await outcome("learner", saving)

    async def _load(self) -> None:
        if self._loaded_version == self._learner_version:
            return
        version = await outcome("learner", self._learner.publish.remote())
        await asyncio.gather(*[outcome("rollout worker", w.load_weights.remote(version)) for w in self._workers])
        self._loaded_version = version.version


async def outcome(who: str, call: Awaitable[Any]) -> Any:
    """The call's result, or the error of ours that it means."""
    try:
        return await call
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PotstillError):
            raise cause from None
        raise RunError(f"the {who} failed: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        raise WorkerLost(f"the {who}'s process died; its log is in Ray's session folder") from error
