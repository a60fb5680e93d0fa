"""One attempt of a run: open, evaluate, distil, evaluate, save; from wherever the run stands.

    newest sound checkpoint ──► step, counters, prompts trained       chunks of the spool ──► scored, not yet trained
                  └──────────────────────── distil goes on ────────────────────────┘

The first attempt is one that finds neither. Losing the learner or a teacher ends an attempt, not the run (run.py); its
number is the fencing token of everything that it writes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from orchestrator.buffer import Buffer, Closed
from orchestrator.chores import Chores
from orchestrator.crew import Crew
from orchestrator.launch import Site
from orchestrator.loop import distil
from orchestrator.offpolicy import OffPolicy
from orchestrator.prompts import PromptStream
from orchestrator.recorder import Recorder
from orchestrator.spending import in_all
from orchestrator.stopping import unless_asked
from orchestrator.tasks import until
from orchestrator.teachers import Faculty
from potstill import spool
from potstill.config import RunConfig
from potstill.durable import sweep
from potstill.environments import open_environment
from potstill.fencing import Fence, next_attempt
from potstill.journal import Journal, Status, steps_in
from potstill.spans import FOLDER, Spans
from potstill.types import StartingPoint


class Attempt:
    """`stopping`: set when the run is asked to end."""

    def __init__(self, config: RunConfig, site: Site, journal: Journal, stopping: asyncio.Event) -> None:
        self._config = config
        self._site = site
        self._journal = journal
        self._stopping = stopping
        self._environment = open_environment(config.data)
        spans = Spans(journal.folder / FOLDER / "loop.jsonl", "loop")
        self.recorder = Recorder(journal=journal, config=config.loop, spans=spans)
        self.chores: Chores
        self.spent: Mapping[str, Any] = {}

    async def run(self, faculty: Faculty) -> None:
        """To the end of the run. Raises WorkerLost or ChunkLost for what another attempt may mend, Closed when the run
        was asked to stop and has left a checkpoint of its steps, where it had made one."""
        config, journal = self._config, self._journal
        fence = Fence(journal.folder, next_attempt(journal.folder))
        for name in ("checkpoints", "rollouts"):
            sweep(journal.folder / name)
        async with contextlib.AsyncExitStack() as stack:
            opening = stack.enter_async_context(self._site.open(config, faculty, fence, journal))
            crew, start = await unless_asked(self._stopping, opening)
            offpolicy = OffPolicy.of(config)
            prompts = PromptStream(
                self._environment,
                seed=config.seed,
                prompts_per_step=config.rollout.prompts_per_step,
                offpolicy=offpolicy,
            )
            self.chores = Chores(
                config,
                crew=crew,
                journal=journal,
                recorder=self.recorder,
                data=self._environment,
                offpolicy=offpolicy,
                stopping=self._stopping,
            )
            buffer = self._go_on(start)
            journal.status(Status.RUNNING)
            await until(self._work(crew, prompts, buffer, start.extra), crew.watch())

    async def _work(self, crew: Crew, prompts: PromptStream, buffer: Buffer, extra: Mapping[str, Any]) -> None:
        try:
            await self.chores.before(extra)
            await until(distil(crew, prompts, buffer, self.recorder, self.chores), self._close_when_asked(buffer))
            await self.chores.after(buffer.trained)
        except Closed:
            if self.recorder.steps_done:
                await self.chores.stop(buffer.trained)
            raise
        self.spent = in_all(await crew.spent())

    async def _close_when_asked(self, buffer: Buffer) -> None:
        await self._stopping.wait()
        buffer.close()

    def _go_on(self, start: StartingPoint) -> Buffer:
        """The counters as the checkpoint has them, and what was scored after it."""
        assert start.published is not None, "rank 0 publishes, and it is asked"
        config, journal, version = self._config, self._journal, start.published.version
        for flaw in start.damaged:
            journal.event("checkpoint.corrupted", f"{flaw}; an earlier one is used", level="error")
        self.recorder.go_on(version, steps_in(journal.folder))
        trained = [index for first, stop in start.extra.get("trained", []) for index in range(first, stop)]
        buffer = Buffer(
            config.loop,
            prompts_per_step=config.rollout.prompts_per_step,
            prompts_per_call=config.rollout.prompts_per_call or self._share,
            version=version,
            trained=trained if start.extra else None,
        )
        found = spool.listing(journal.folder / "rollouts", thorough=True)
        for flaw in found.lost.values():
            journal.event("spool.corrupted", f"{flaw}; its prompts are written again", level="warn")
        kept = sum(buffer.refill(groups) for groups in found.chunks.values())
        if version or kept:
            message = f"going on from step {version}, with {kept} prompts that were scored and not yet trained"
            journal.event("run.resumed", message, step=version, kept=kept)
        else:
            journal.event("run.started", f"{config.method} on {config.data.kind}", steps=config.loop.steps)
        return buffer

    @property
    def _share(self) -> int:
        """Prompts of one step that fall to one worker."""
        return -(-self._config.rollout.prompts_per_step // self._config.rollout.workers)
