"""What the loop itself costs, from one worker to a thousand: `python -m bench.scale` prints one JSON object.

    real        the loop, its crew, roster, buffer, prompts, chores, and the recorder with its files
    stand-ins   whatever is behind an actor's handle: to write, score, load, step is to wait as long as COST says

    simulated   the stand-ins live in this process; all that passes between them and the loop is pickled and counted.
                Time passes as ever while this process computes and is skipped while everybody waits: a loop that is
                too slow for its workers is as late here as in life
    ray         the same stand-ins as Ray actors, in real time, all waits shorter: what Ray's calls add

Efficiency is trained tokens against what the workers would write if nothing ever waited. CPU is this process's, the
stand-ins' own share of it included where they live in it. A step has PER_WORKER
prompts for each worker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import pickle
import random
import selectors
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from potstill.types import Bundle, FinishReason, Prompt, Receipt, StepBatch, StepReport, WeightsVersion

PER_WORKER, PER_CALL, CALLS = 16, 4, 8  # prompts of a step; of a call; calls at once, for the short wait for the long
MAX_STALENESS = 4
WARM_UP_STEPS, STEPS, FEWEST_ROLLOUTS = 4, 6, 3000
LAST_STEPS = MAX_STALENESS  # not measured: nothing is left to write


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """How long the stand-ins take, in seconds and tokens a second; all of it `faster` times faster."""

    slots: int = 16  # rollouts that a worker writes at once
    tokens_per_s: float = 50.0  # of each of them
    mean_tokens: float = 10_000.0
    sigma: float = 0.5  # lengths are log-normal
    max_tokens: int = 24_000
    scored_tokens_per_s: float = 20_000.0  # of a rollout, after it is written
    load_s: float = 2.0  # during which a worker's writing stands still
    publish_s: float = 2.0
    step_share: float = 0.8  # of the time that the workers write for a step, which the learner takes for it
    faster: float = 1.0

    def tokens(self, source: random.Random) -> int:
        mu = math.log(self.mean_tokens) - self.sigma**2 / 2
        return min(self.max_tokens, 1 + int(source.lognormvariate(mu, self.sigma)))

    def ideal(self, workers: int) -> float:
        """Tokens a second that so many write when none of them ever waits."""
        return workers * self.slots * self.tokens_per_s * self.faster

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.faster)


class SimulatedWorker:
    """A rollout worker's calls; its texts are numbers."""

    def __init__(self, number: int, cost: Cost, store: Callable[[], Any] | None = None) -> None:
        """`store`: puts something into the object store that stands for the rollouts of a call."""
        self._cost = cost
        self._store = store
        self._random = random.Random(number)
        self._slots = asyncio.Semaphore(cost.slots)
        self._version = 0
        self._stood_still = 0.0

    async def rollout(self, chunk: range, prompts: Sequence[Prompt], oldest: int) -> list[list[Receipt]]:
        texts = await asyncio.gather(*[self._text() for _ in chunk])
        bundle = Bundle(
            ref=None if self._store is None else self._store(),
            path=f"/runs/a-run/rollouts/{chunk.start:09d}-{chunk.stop - 1:09d}.safetensors",
        )
        return [
            [self._receipt(prompt, bundle, position, *text)]
            for position, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]

    async def load_weights(self, version: WeightsVersion) -> int:
        self._stood_still += self._cost.load_s
        await self._cost.wait(self._cost.load_s)
        self._version = version.version
        return self._version

    async def describe(self, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        return []

    async def beat(self) -> None:
        pass

    async def _text(self) -> tuple[int, int]:
        """Write and score one: (tokens, version of the first of them)."""
        tokens = self._cost.tokens(self._random)
        async with self._slots:
            version, left = self._version, tokens / self._cost.tokens_per_s
            while left:
                before = self._stood_still
                await self._cost.wait(left)
                left = self._stood_still - before
        await self._cost.wait(tokens / self._cost.scored_tokens_per_s)
        return tokens, version

    def _receipt(self, prompt: Prompt, bundle: Bundle, position: int, tokens: int, version: int) -> Receipt:
        return Receipt(
            rollout_id=f"{prompt.id}/0",
            prompt_id=prompt.id,
            index=prompt.index,
            domain=prompt.domain,
            oldest_version=version,
            num_prompt_tokens=64,
            num_completion_tokens=tokens,
            num_loss_tokens=tokens,
            num_unscored_tokens=0,
            finish_reason=FinishReason.LENGTH if tokens == self._cost.max_tokens else FinishReason.STOP,
            reward=math.nan,
            generate_s=tokens / self._cost.tokens_per_s,
            score_s=tokens / self._cost.scored_tokens_per_s,
            repetition=0.5,
            bundle=bundle,
            position=position,
        )


class SimulatedLearner:
    """A learner's calls; its weights are a number."""

    def __init__(self, cost: Cost, workers: int) -> None:
        self._cost = cost
        self._tokens_per_s = cost.ideal(workers) / cost.step_share / cost.faster
        self._version = 0

    async def check(self, batch: StepBatch, num_rollouts: int) -> dict[str, float]:
        return {}

    async def step(self, batch: StepBatch) -> StepReport:
        await self._cost.wait(batch.num_loss_tokens / self._tokens_per_s)
        self._version = batch.step
        return StepReport(step=batch.step, metrics={"loss": 0.0, "reverse_kl": 0.0}, seconds={})

    async def publish(self) -> WeightsVersion:
        await self._cost.wait(self._cost.publish_s)
        return published(self._version)

    async def annotate(self, receipts: Sequence[Receipt]) -> list[None]:
        return []

    async def beat(self) -> None:
        pass


def published(version: int) -> WeightsVersion:
    return WeightsVersion(version=version, digest="", checksums=(), tensors=(), payload=None)


# ------------------------------------------------------------------------------------------ where the stand-ins live


class Wire:
    """Handles of stand-ins in this process: what a call takes and what it answers travel as bytes, and are counted."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def handle(self, actor: object) -> Any:
        return _Handle(self, actor)

    def carried(self, value: Any) -> Any:
        content = pickle.dumps(value, protocol=5)
        self.num_bytes += len(content)
        return pickle.loads(content)  # noqa: S301  our own bytes, of a moment ago


class _Handle:
    def __init__(self, wire: Wire, actor: object) -> None:
        self._wire = wire
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return _Method(self._wire, getattr(self._actor, name))


@dataclass(frozen=True, slots=True)
class _Method:
    wire: Wire
    method: Callable[..., Awaitable[Any]]

    async def remote(self, *arguments: Any) -> Any:
        return self.wire.carried(await self.method(*self.wire.carried(arguments)))


class Skipping(asyncio.SelectorEventLoop):
    """Its time passes while something is computed, and is skipped while everybody waits."""

    def __init__(self) -> None:
        self.skipped = 0.0
        super().__init__(_Impatient(self))

    def time(self) -> float:
        return super().time() + self.skipped


class _Impatient(selectors.DefaultSelector):
    def __init__(self, clock: Skipping) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)
        ready = super().select(0)
        if not ready:
            self._clock.skipped += max(0.0, timeout)
        return ready


# ---------------------------------------------------------------------------------------------------------- one run


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
