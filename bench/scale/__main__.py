"""What the loop itself costs, from one worker to a thousand: `python -m bench.scale` prints one JSON object.

    real        the loop, its crew, roster, buffer, prompts, chores, and the recorder with its files
    stand-ins   whatever is behind an actor's handle (stand_ins.py)

    simulated   the stand-ins live in this process; all that passes between them and the loop is pickled and counted.
                Time passes as ever while this process computes and is skipped while everybody waits: a loop that is
                too slow for its workers is as late here as in life
    ray         the same stand-ins as Ray actors, in real time, all waits shorter: what Ray's calls add

Efficiency is trained tokens against what the workers would write if nothing ever waited. CPU is this process's, the
stand-ins' own share of it included where they live in it. A step has PER_WORKER prompts for each worker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.scale.one_process import Skipping, Wire
from bench.scale.stand_ins import Cost, SimulatedLearner, SimulatedWorker, published
from orchestrator.buffer import Buffer
from orchestrator.chores import Chores
from orchestrator.crew import Crew
from orchestrator.learners import Learners
from orchestrator.loop import distil
from orchestrator.prompts import PromptStream
from orchestrator.recorder import Recorder
from orchestrator.roster import Roster, Worker
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.environments import open_environment
from potstill.journal import Journal, steps_in
from potstill.spans import Spans
from potstill.types import StepBatch

PER_WORKER, PER_CALL, CALLS = 16, 4, 8  # prompts of a step; of a call; calls at once, for the short wait for the long
MAX_STALENESS = 4
WARM_UP_STEPS, STEPS, FEWEST_ROLLOUTS = 4, 6, 3000
LAST_STEPS = MAX_STALENESS  # not measured: nothing is left to write


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a run stood after a step."""

    clock: float
    cpu_s: float
    tokens: int


class Marking(Chores):
    """The chores of a run, which notes where it stands after each step."""

    marks: list[Mark]
    recorder: Recorder

    async def after_step(self, batch: StepBatch, trained: Sequence[range]) -> None:
        await super().after_step(batch, trained)
        clock = asyncio.get_running_loop().time()
        self.marks.append(Mark(clock, time.process_time(), self.recorder.tokens_trained))


def simulated(workers: int, cost: Cost, order: str) -> dict[str, Any]:
    """All in this process."""
    wire = Wire()

    @asynccontextmanager
    async def actors() -> AsyncIterator[tuple[list[Any], Any]]:
        made = [wire.handle(SimulatedWorker(number, cost)) for number in range(workers)]
        yield made, wire.handle(SimulatedLearner(cost, workers))

    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=Skipping) as runner:
        found, num_rollouts = runner.run(run(actors, workers, cost, order, Path(folder)))
    bulk = cost.mean_tokens * (4 + 4 + 4 + 1 + 16 * (4 + 4 + 4))  # ids, log-probs, versions, mask, top 16 twice
    return {**found, "bytes_per_rollout": round(wire.num_bytes / num_rollouts), "bulk_bytes_per_rollout": round(bulk)}


def on_ray(workers: int, cost: Cost, order: str) -> dict[str, Any]:
    """The same with each stand-in in a process of its own; one actor for the learner as well."""
    import ray

    def store() -> Any:
        import numpy as np

        return ray.put(np.zeros(1 << 17, np.uint8))  # large enough not to travel inside the answer

    @asynccontextmanager
    async def actors() -> AsyncIterator[tuple[list[Any], Any]]:
        remote = [ray.remote(num_cpus=0)(cls) for cls in (SimulatedWorker, SimulatedLearner)]
        yield [remote[0].remote(number, cost, store) for number in range(workers)], remote[1].remote(cost, workers)

    environment = {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    ray.init(
        include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment},
        object_store_memory=512 << 20,
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(run(actors, workers, cost, order, Path(folder)))[0]
    finally:
        ray.shutdown()


async def run(
    actors: Callable[[], Any], workers: int, cost: Cost, order: str, folder: Path
) -> tuple[dict[str, Any], int]:
    """Figures of the steps between warm-up and end, and how many rollouts the whole run trained."""
    steps = max(STEPS, -(-FEWEST_ROLLOUTS // (workers * PER_WORKER)))
    config = config_of(folder, workers, WARM_UP_STEPS + steps + LAST_STEPS, order)
    rollout, journal = config.rollout, Journal(folder / "run")
    recorder = Recorder(journal=journal, config=config.loop, spans=Spans(folder / "spans.jsonl", "loop"))
    data = open_environment(config.data)
    async with actors() as (made, learner):

        async def hire(number: int, anew: bool) -> Worker:
            return Worker(number=number, actor=made[number], version=0)

        roster = Roster(hire, lambda number, error: None, wanted=workers, at_least=workers, restarts=0)
        await roster.open()
        crew = Crew(
            config, learners=Learners([learner]), roster=roster, published=published(0), journal=journal, teachers=[]
        )
        chores = Marking(
            config, crew=crew, journal=journal, recorder=recorder, data=data, offpolicy=None, stopping=asyncio.Event()
        )
        chores.marks, chores.recorder = [], recorder
        buffer = Buffer(config.loop, prompts_per_step=rollout.prompts_per_step, prompts_per_call=PER_CALL)
        prompts = PromptStream(data, seed=0, prompts_per_step=rollout.prompts_per_step)
        await distil(crew, prompts, buffer, recorder, chores)
        await crew.close()
    journal.close()
    return figures(chores.marks, journal.folder, workers, cost), recorder.steps_done * rollout.prompts_per_step


def config_of(folder: Path, workers: int, steps: int, order: str) -> RunConfig:
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "what is the way of " * 12}) + "\n")
    return parse(
        {
            "name": "scale",
            "runs": str(folder),
            "method": "opd",
            "student": {"model": str(folder)},
            "teacher": {"kind": "server", "model": str(folder)},
            "data": {"kind": "jsonl", "path": str(folder / "prompts.jsonl")},
            "rollout": {
                "workers": workers,
                "prompts_per_step": workers * PER_WORKER,
                "prompts_per_call": PER_CALL,
                "calls": CALLS,
                "sampling": {"max_new_tokens": 24_000},
            },
            "optim": {"lr": 1e-6},
            "loop": {"steps": steps, "max_staleness": MAX_STALENESS, "order": order},
            "checkpoint": {"every": 0},
        }
    )


def figures(marks: Sequence[Mark], folder: Path, workers: int, cost: Cost) -> dict[str, Any]:
    began, ended = marks[WARM_UP_STEPS - 1], marks[-1 - LAST_STEPS]
    records = steps_in(folder)[WARM_UP_STEPS:-LAST_STEPS]
    seconds, cpu_s = ended.clock - began.clock, ended.cpu_s - began.cpu_s
    rollouts = len(records) * workers * PER_WORKER
    tokens_per_s, ideal = (ended.tokens - began.tokens) / seconds, cost.ideal(workers)
    return {
        "workers": workers,
        "rollouts": rollouts,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens_per_s),
        "ideal_tokens_per_second": round(ideal),
        "efficiency": round(tokens_per_s / ideal, 3),
        "cpu_ms_per_rollout": round(1000 * cpu_s / rollouts, 3),
        "cpu_share_of_a_core": round(cpu_s / seconds, 4),
        "staleness_max": max(record["staleness_max"] for record in records),
        "refused": records[-1]["refused"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 16, 256, 1000])
    parser.add_argument("--ray-workers", type=int, nargs="*", default=[8])
    parser.add_argument("--order", choices=["finish", "prompt"], default="finish")
    options = parser.parse_args()
    cost, hastened = Cost(), Cost(faster=200.0)
    report = {
        "cost": asdict(cost),
        "prompts": {"per_worker_and_step": PER_WORKER, "per_call": PER_CALL, "calls": CALLS},
        "loop": {"max_staleness": MAX_STALENESS, "order": options.order},
        "simulated": [simulated(workers, cost, options.order) for workers in options.workers],
        "ray_faster": hastened.faster,
        "ray": [on_ray(workers, hastened, options.order) for workers in options.ray_workers],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
