"""Trained tokens a second of whole runs, beside their stages alone and beside a peer: prints one JSON object.

    python -m bench.end_to_end [--engines transformers vllm] [--rounds 2] [--steps 8] [--peer]

The work is bench.steady_state's. Each round measures, one after the other, the stages alone (bench/stages.py), a
synchronous run, asynchronous ones (loop.max_staleness = 1 and 2) and, with --peer, TRL's DistillationTrainer on the
same models, prompts, lengths and batch, so that a noisy machine is as noisy to each. Medians over rounds; a run's speed
is that of its steps after the warm-up, all that happens between steps included.

    chain      the stages' sum / (1 + max_staleness), or the slowest stage: what the order of the work allows, each
               stage as fast as alone, since step s is written by a version of at least s - 1 - max_staleness
    overhead   what a synchronous step takes beyond the sum of its stages, as a share of the step
    capacity   how many times more matrix products this machine does with every core busy than with one
    floor      CPU seconds of all stages / capacity, or the slowest stage: no schedule makes a step faster here
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import steady_state as work
from bench.peer import install, peer
from bench.stages import STAGES
from orchestrator.launch import ACTOR_ENV, Site, site
from orchestrator.run import execute
from potstill.config import RunConfig
from potstill.journal import Journal, steps_in

WARM_UP, LAST = 3, 2  # steps at the ends that are not steady; of an asynchronous run, nothing is written at the end
MANY_STEPS = 10_000  # of which a run makes the first few: what is done a few times a run is not done all the time
MODES = {"synchronous": 0, "asynchronous": 1, "asynchronous_2": 2}
"""By loop.max_staleness. Three stages overlap when two versions are in flight behind the one that is made."""
PRODUCTS_S, START_S = 2.0, 5.0
PRODUCTS = """
import sys, time, torch
torch.set_num_threads(1)
a, b, count = torch.randn(1024, 320), torch.randn(320, 1280), 0
time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
end = time.perf_counter() + float(sys.argv[2])
while time.perf_counter() < end:
    a @ b
    count += 1
print(count)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="measured, of each run and round")
    parser.add_argument("--peer", action="store_true", help="install TRL in an environment of its own, and measure it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measured = asyncio.run(measure(Path(scratch), options))
    print(json.dumps(measured, indent=2))


async def measure(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    texts = work.words(random.Random(0), lines=4000)
    work.write_prompts(scratch / "prompts.jsonl", texts)
    first = config(scratch, options.engines[0], "synchronous", 0, options.steps)
    turns: dict[str, list[dict[str, Any]]] = {engine: [] for engine in options.engines}
    peers: list[tuple[float, float]] = []
    with ExitStack() as stack:
        async with site(first) as opened:
            for name, architecture in {"student": work.STUDENT, "teacher": work.TEACHER}.items():
                await opened.create(scratch / name, architecture, texts=texts, seed=0)
            trl = stack.enter_context(_peer(scratch)) if options.peer else None
            if trl is not None:
                await asyncio.to_thread(trl.train, WARM_UP)
            for turn in range(options.rounds):
                for engine in options.engines:
                    turns[engine].append(await one_turn(scratch, opened, engine, turn, options.steps))
                    peers += [] if trl is None else await asyncio.to_thread(trl.train, options.steps)
    worth = statistics.median(capacity() for _ in range(3))
    report: dict[str, Any] = {"cores": os.cpu_count(), "capacity": round(worth, 2), "load": os.getloadavg()}
    if options.peer:
        report["trl"] = {"trained_tokens_per_second": round(speed(peers)), "steps": len(peers)}
    for engine, found in turns.items():
        report[engine] = compared(found, worth, report.get("trl"))
    return report


def capacity() -> float:
    """Matrix products with every core busy, each by a process of its own, over those of one process."""
    return _products(os.cpu_count() or 1) / _products(1)


def _products(processes: int) -> int:
    start = time.time() + START_S
    command = [sys.executable, "-c", PRODUCTS, str(start), str(PRODUCTS_S)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(int(process.communicate()[0]) for process in started)


def _peer(scratch: Path) -> Any:
    python = install(scratch / "peer")
    return peer(
        python, scratch / "peer.log", scratch / "student", scratch / "teacher", scratch / "prompts.jsonl",
        work.NEW_TOKENS, work.ROLLOUTS, 1e-4,
    )  # fmt: skip


async def one_turn(scratch: Path, opened: Site, engine: str, turn: int, steps: int) -> dict[str, Any]:
    alone = await asyncio.to_thread(stages, scratch, config(scratch, engine, "synchronous", turn, steps), steps)
    runs = {}
    for mode in MODES:
        run = config(scratch, engine, mode, turn, steps)
        journal = Journal(scratch / run.name)
        await execute(run, opened, journal)
        journal.close()
        runs[mode] = steady(steps_in(journal.folder), steps)
    return {"alone": alone, **runs}


def config(scratch: Path, engine: str, mode: str, turn: int, steps: int) -> RunConfig:
    """bench.steady_state's, of a long run that its token budget ends after the steps that are measured."""
    made = work.config(scratch, engine, MANY_STEPS)
    budget = (WARM_UP + steps + LAST - 1) * work.ROLLOUTS * work.NEW_TOKENS
    loop = made.loop.model_copy(update={"max_staleness": MODES[mode], "max_train_tokens": budget})
    return made.model_copy(update={"name": f"{engine}-{mode}-{turn}", "loop": loop})


def stages(scratch: Path, run: RunConfig, rounds: int) -> dict[str, Any]:
    path = scratch / f"{run.name}.json"
    path.write_text(run.model_dump_json())
    environment = {**os.environ, **ACTOR_ENV, "OMP_NUM_THREADS": str(run.rollout.threads)}
    command = [sys.executable, "-m", "bench.stages", str(path), str(rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def steady(steps: Sequence[Mapping[str, Any]], wanted: int) -> list[tuple[float, float]]:
    """(seconds, trained tokens) of the steps in the middle; a step lasts until the next one's end."""
    ends = [(step["time"], step["tokens_trained"]) for step in steps]
    laps = [(now - before, total - so_far) for (before, so_far), (now, total) in itertools.pairwise(ends)]
    return laps[WARM_UP - 1 :][:wanted]


def speed(steps: Sequence[tuple[float, float]]) -> float:
    """Tokens a second of the median step."""
    return statistics.median(tokens / seconds for seconds, tokens in steps)


def compared(turns: Sequence[Mapping[str, Any]], worth: float, trl: Mapping[str, Any] | None) -> dict[str, Any]:
    """Medians over all rounds, and their ratios. `worth`: the machine's capacity, in cores."""
    tokens = statistics.median(count for turn in turns for count in turn["alone"]["tokens"])
    seconds, cpu = (
        {stage: statistics.median(one for turn in turns for one in turn["alone"][kind][stage]) for stage in STAGES}
        for kind in ("seconds", "cpu_seconds")
    )
    found = {mode: speed([step for turn in turns for step in turn[mode]]) for mode in MODES}
    in_turn, slowest = sum(seconds.values()), max(seconds.values())
    floor = max(slowest, sum(cpu.values()) / worth)
    step_s = {mode: tokens / found[mode] for mode in MODES}
    return {
        "trained_tokens_per_second": {mode: round(each) for mode, each in found.items()},
        "seconds_per_step": {mode: round(each, 3) for mode, each in step_s.items()},
        "seconds_alone": {stage: round(each, 3) for stage, each in seconds.items()},
        "cpu_seconds_alone": {stage: round(each, 3) for stage, each in cpu.items()},
        "tokens_per_second_alone": {
            "sum_of_stages": round(tokens / in_turn),
            "slowest_stage": round(tokens / slowest),
            "floor": round(tokens / floor),
        },
        "synchronous_overhead": round(1 - in_turn / step_s["synchronous"], 3),
        **{
            f"{mode}_of": {
                "slowest_stage": round(slowest / step_s[mode], 3),
                "floor": round(floor / step_s[mode], 3),
                "chain": round(max(slowest, in_turn / (1 + staleness)) / step_s[mode], 3),
            }
            for mode, staleness in MODES.items()
            if staleness
        },
        **(
            {"of_trl": {mode: round(found[mode] / trl["trained_tokens_per_second"], 2) for mode in MODES}}
            if trl
            else {}
        ),
    }


if __name__ == "__main__":
    main()
