"""The run, as a list of verbs.

      prompts ──► generate ×W ──► buffer ──► train ──► publish ──► workers hold version n
                     ▲   (one task per worker)   (one task)            │
                     └─────────────── grant: i < (V+1+S)·B ◄───────────┘

generate  asks the buffer for prompt indices, has its worker write and score them, hands in the receipts.
          Waits for a grant; woken by `advance`, when a version is out.
train     takes the batch of step n, steps, publishes, advances the buffer, records.
          Waits for the batch; woken by `put`.
watch     waits for the death of the teacher that the run started.

Synchronous training is max_staleness S = 0: no grant is given while a step is in progress. Nothing else differs.
Bulk arrays never pass through here. A feature that wants an `if` in this file belongs in an object that it calls.
"""

from __future__ import annotations

import asyncio

from orchestrator.buffer import Buffer
from orchestrator.chores import Chores
from orchestrator.crew import Crew
from orchestrator.prompts import PromptStream
from orchestrator.recorder import Recorder


async def distil(crew: Crew, prompts: PromptStream, buffer: Buffer, recorder: Recorder, chores: Chores) -> None:
    """Train until the recorder counts no more steps. Raises what the first failing task raised; none outlives it."""
    training = asyncio.create_task(_train(crew, buffer, recorder, chores))
    generating = [asyncio.create_task(_generate(crew, w, prompts, buffer)) for w in range(crew.num_workers)]
    watching = asyncio.create_task(crew.teacher_lost())
    try:
        await _first_failure_or(training, [watching, *generating])
    finally:
        for task in (training, watching, *generating):
            task.cancel()
        await asyncio.gather(training, watching, *generating, return_exceptions=True)


async def _generate(crew: Crew, worker: int, prompts: PromptStream, buffer: Buffer) -> None:
    while granted := await buffer.grant(crew.share):
        groups = await crew.rollout(worker, prompts.take(granted))
        for index, receipts in zip(granted, groups, strict=True):
            await buffer.put(index, receipts)


async def _train(crew: Crew, buffer: Buffer, recorder: Recorder, chores: Chores) -> None:
    for step in recorder.steps():
        with recorder.waiting_for("generate"):
            batch = await buffer.batch(step)
        with recorder.waiting_for("canaries"):
            await chores.canaries(batch)
        with recorder.waiting_for("train"):
            report = await crew.step(batch)
        with recorder.waiting_for("weights"):
            version = await crew.publish()
        await buffer.advance(version)
        recorder.step(batch, report, num_waiting=buffer.num_waiting)
        await chores.after_step(batch)


async def _first_failure_or(training: asyncio.Task[None], others: list[asyncio.Task[None]]) -> None:
    """Return when training has ended; raise as soon as any task has failed."""
    pending: set[asyncio.Task[None]] = {training, *others}
    while training in pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
