"""The composition root: a RunConfig becomes processes. The only file that imports other rooms, inside functions.

A `Site` is a connection to Ray with a learner and rollout workers; it is opened for one run after another, so that
several runs in a row (a recipe's phases) pay for starting processes once. Teachers are teachers.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from orchestrator.crew import Crew, outcome
from orchestrator.teachers import Faculty
from potstill.config import RunConfig, ScratchConfig
from potstill.teachers.opening import ALLOWED

OBJECT_STORE_BYTES = 512 << 20  # of a local Ray: weights in flight and scored rollouts of a laptop's run
ACTOR_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    **{name: os.environ[name] for name in (ALLOWED,) if name in os.environ},
}


class Site:
    """Ray, one learner and some rollout workers, without a run."""

    def __init__(self, learner: Any, workers: list[Any]) -> None:
        self._learner = learner
        self._workers = workers

    async def open(self, config: RunConfig, faculty: Faculty) -> Crew:
        """Have every process load what the run needs. Raises ConfigError when one of them cannot."""
        accesses, met = faculty.accesses, faculty.met
        opening = [w.open.remote(config, accesses, met, number) for number, w in enumerate(self._workers)]
        version, *_ = await asyncio.gather(
            outcome("learner", self._learner.open.remote(config, met)),
            *[outcome("rollout worker", worker) for worker in opening],
        )
        return Crew(
            config,
            learner=self._learner,
            workers=self._workers,
            version=version,
            teachers=faculty.processes,
        )

    async def create(self, folder: Path, architecture: ScratchConfig, *, texts: list[str], seed: int) -> None:
        """Write a model folder from nothing, replacing what is there."""
        await outcome("learner", self._learner.create.remote(str(folder), architecture, texts, seed))


@contextlib.asynccontextmanager
async def site(config: RunConfig) -> AsyncIterator[Site]:
    """Connect to Ray (RAY_ADDRESS, or a local one that ends with us) and start the actors of `config`."""
    import ray

    from learner.actor import Learner
    from rollout_worker.actor import RolloutWorker

    await asyncio.to_thread(_connect)
    _take_back_sigterm()
    try:
        learner = _actor(Learner, config.learner.threads)
        workers = [_actor(RolloutWorker, config.rollout.threads) for _ in range(config.rollout.workers)]
        yield Site(learner, workers)
    finally:
        await asyncio.to_thread(ray.shutdown)


def _connect() -> None:
    import ray

    local = {} if os.environ.get("RAY_ADDRESS") else {"object_store_memory": OBJECT_STORE_BYTES}
    ray.init(
        include_dashboard=None if not local else False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": ACTOR_ENV},
        **local,
    )


def _take_back_sigterm() -> None:
    """Ray takes SIGTERM for a crash: it prints a stack and aborts us three seconds later, in the middle of cleaning up.

    Registering Python's handler once more puts it back in the place of Ray's.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.siginterrupt(signal.SIGTERM, False)


def _actor(cls: type, threads: int) -> Any:
    import ray

    options = {"num_cpus": 0, "runtime_env": {"env_vars": {**ACTOR_ENV, "OMP_NUM_THREADS": str(threads)}}}
    return ray.remote(cls).options(**options).remote()
