"""The three stages of a step, each alone: to write, to score, to train; nothing else runs meanwhile.

    python -m bench.stages CONFIG.json ROUNDS

One process that does in turn what a rollout worker and a learner do, by the same code and on as many threads, and a
teacher server beside it, which works while the process waits. Prints one JSON line: of each round the seconds and the
CPU seconds, the server's included, by stage, and the trained tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from orchestrator.launch import ACTOR_ENV
from orchestrator.prompts import PromptStream
from orchestrator.teachers import teachers
from potstill.config import RunConfig
from potstill.environments import open_environment
from potstill.types import ScoredRollout
from potstill.wire import Capabilities

WARM_UP = 2
STAGES = ("generate", "score", "train")


class Clock:
    """Seconds, and CPU seconds of this process and all below it, since the last look."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._now()

    def lap(self) -> tuple[float, float]:
        before, self._before = self._before, self._now()
        return self._before[0] - before[0], self._before[1] - before[1]

    def _now(self) -> tuple[float, float]:
        times = [one.cpu_times() for one in [self._process, *self._process.children(recursive=True)]]
        return time.perf_counter(), sum(each.user + each.system for each in times)


async def measure(config: RunConfig, rounds: int) -> dict[str, Any]:
    from rollout_worker.opening import open_worker

    prompts = PromptStream(
        open_environment(config.data), seed=config.seed, prompts_per_step=config.rollout.prompts_per_step
    )
    laps: list[list[tuple[float, float]]] = []
    tokens: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        async with teachers(config, Path(folder), ACTOR_ENV) as faculty:
            worker = await open_worker(config, faculty.accesses, faculty.met, 0)
            train = learner(config, faculty.met)
            for number in range(WARM_UP + rounds):
                first = number * config.rollout.prompts_per_step
                chunk = prompts.take(range(first, first + config.rollout.prompts_per_step))
                clock = Clock()
                written = await worker.collector.write(chunk)
                lap = [clock.lap()]
                collected = await worker.collector.score(written)
                lap.append(clock.lap())
                train(list(collected.scored), number + 1)
                lap.append(clock.lap())
                laps.append(lap)
                tokens.append(sum(scored.rollout.num_loss_tokens for scored in collected.scored))
            await worker.close()
    measured = laps[WARM_UP:]
    return {
        "seconds": {stage: [lap[place][0] for lap in measured] for place, stage in enumerate(STAGES)},
        "cpu_seconds": {stage: [lap[place][1] for lap in measured] for place, stage in enumerate(STAGES)},
        "tokens": tokens[WARM_UP:],
    }


def learner(config: RunConfig, met: Capabilities | None) -> Callable[[list[ScoredRollout], int], None]:
    """What makes a step of rollouts, as learner/actor.py opens it."""
    import torch

    from learner.aggregation import Denominators
    from learner.model import load_student
    from learner.sent_states import SentStates
    from learner.trainer import Trainer

    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.seed)
    student = load_student(config.student, seed=config.seed, device=torch.device("cpu"))
    trainer = Trainer(config, student, SentStates.of(config, met, student))

    def step(scored: list[ScoredRollout], number: int) -> None:
        num_loss_tokens = sum(one.rollout.num_loss_tokens for one in scored)
        trainer.step(
            scored, step=number, denominators=Denominators(num_loss_tokens=num_loss_tokens, num_sequences=len(scored))
        )

    return step


def main() -> None:
    path, rounds = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    config = RunConfig.model_validate_json(Path(path).read_text())
    print(json.dumps(asyncio.run(measure(config, int(rounds)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
