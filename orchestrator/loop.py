"""The run, as a list of verbs.

                        ┌──────────── lost: the chunk goes back ───────────┐
                        ▼                                                  │
    prompts ──► lease a chunk ──► rollout: write, score ──► buffer ──► train ──► publish version n
                  ▲     (each worker, some calls at once)                (the learner)     │
                  └──────────────── follow: load version n ◄───────────────────────────────┘
                                    (each worker, at its own pace)

generate  leases a chunk of prompts, has the worker write and score it, hands in the receipts.
          Waits for a lease, which the staleness rule gives or not (buffer.py).
follow    has the worker load what the learner published last. Waits for a newer version.
train     takes the batch of step n, steps, publishes version n, advances the buffer, records.
          Waits for the batch.
tend      employs every worker from its coming to its end: some may be lost and others join while the run goes on.

Synchronous training is max_staleness 0: no lease is given before the worker holds the step's own weights. Nothing else
differs. Bulk arrays never pass through here. A feature that wants an `if` in this file belongs in an object it calls.
"""

from __future__ import annotations

import asyncio

from orchestrator.buffer import Buffer
from orchestrator.chores import Chores
from orchestrator.crew import Crew
from orchestrator.prompts import PromptStream
from orchestrator.recorder import Recorder
from orchestrator.roster import Worker
from orchestrator.tasks import until
from potstill.errors import WorkerLost


async def distil(crew: Crew, prompts: PromptStream, buffer: Buffer, recorder: Recorder, chores: Chores) -> None:
    """Train until the recorder counts no more steps. Raises what the first failing task raised; none outlives it."""
    await until(_train(crew, buffer, recorder, chores), _tend(crew, prompts, buffer, recorder))


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
        buffer.advance(version)
        recorder.step(batch, report, num_waiting=buffer.num_waiting, num_refused=buffer.num_refused)
        await chores.after_step(batch, buffer.trained)


async def _tend(crew: Crew, prompts: PromptStream, buffer: Buffer, recorder: Recorder) -> None:
    async with asyncio.TaskGroup() as employed:
        async for worker in crew.arrivals():
            employed.create_task(_employ(crew, worker, prompts, buffer, recorder))


async def _employ(crew: Crew, worker: Worker, prompts: PromptStream, buffer: Buffer, recorder: Recorder) -> None:
    generating = [_generate(crew, worker, prompts, buffer, recorder) for _ in range(crew.calls)]
    try:
        await until(crew.pulse(worker), _follow(crew, worker, buffer), *generating)
    except WorkerLost as error:
        crew.lost(worker, error)


async def _generate(crew: Crew, worker: Worker, prompts: PromptStream, buffer: Buffer, recorder: Recorder) -> None:
    while True:
        async with buffer.lease(lambda: worker.version, recorder.waiting_for_grant(worker.number)) as chunk:
            buffer.put(chunk, await crew.rollout(worker, chunk, prompts.take(chunk)))


async def _follow(crew: Crew, worker: Worker, buffer: Buffer) -> None:
    while True:
        await crew.follow(worker)
        buffer.worker_moved()
