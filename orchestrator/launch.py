"""The composition root: a RunConfig becomes processes. The only file that imports other rooms, inside functions.

A `Site` is a connection to Ray with a learner and rollout workers; it is opened for one run after another, so that
several runs in a row (a recipe's phases) pay for starting processes once. A teacher server is a process beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.crew import Crew, outcome
from potstill.algebra.objective import Tier
from potstill.config import RunConfig, ScratchConfig, ServerTeacher
from potstill.errors import ConfigError
from potstill.processes import Child, start
from potstill.teacher_client import TeacherClient
from potstill.types import TeacherIdentity

TEACHER_START_S = 120.0
OBJECT_STORE_BYTES = 512 << 20  # of a local Ray: weights in flight and scored rollouts of a laptop's run
ACTOR_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAddress:
    """Where a teacher server answers, who answered there, and its process where the run started one itself."""

    url: str
    key: str
    identity: TeacherIdentity
    context_length: int
    process: Child | None


class Site:
    """Ray, one learner and some rollout workers, without a run."""

    def __init__(self, learner: Any, workers: list[Any]) -> None:
        self._learner = learner
        self._workers = workers

    async def open(self, config: RunConfig, teacher: TeacherAddress | None) -> Crew:
        """Have every process load what the run needs. Raises ConfigError when one of them cannot."""
        address = None if teacher is None else (teacher.url, teacher.key, teacher.identity)
        opening = [w.open.remote(config, _max_model_len(config), address) for w in self._workers]
        version, *_ = await asyncio.gather(
            outcome("learner", self._learner.open.remote(config)),
            *[outcome("rollout worker", worker) for worker in opening],
        )
        return Crew(
            config,
            learner=self._learner,
            workers=self._workers,
            version=version,
            teacher=None if teacher is None else teacher.process,
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
        threads = config.rollout.threads
        workers = [_actor(RolloutWorker, threads, threads) for _ in range(config.rollout.workers)]
        yield Site(learner, workers)
    finally:
        await asyncio.to_thread(ray.shutdown)


@contextlib.asynccontextmanager
async def teacher(config: RunConfig, log: Path) -> AsyncIterator[TeacherAddress | None]:
    """The server that scores this run: the one that is named, one started here, or none where none is needed."""
    if not isinstance(config.teacher, ServerTeacher) or config.objective.tier is Tier.TEXT:
        yield None
        return
    if config.teacher.url is not None and config.teacher.secret_ref is not None:
        yield await _meet(config.teacher.url, _secret(config.teacher.secret_ref), config.teacher, None)
        return
    child, key = await _serve(config.teacher, log)
    try:
        yield await _meet(child.ready["url"], key, config.teacher, child)
    finally:
        await child.stop()


async def _serve(config: ServerTeacher, log: Path) -> tuple[Child, str]:
    assert config.model is not None, "ServerTeacher has a url or a model"
    key = secrets.token_urlsafe(32)
    arguments = [config.model, "--port", "0", "--key-env", "POTSTILL_TEACHER_KEY", "--exit-with-parent"]
    arguments += ["--threads", str(config.threads)]
    env = {**ACTOR_ENV, "POTSTILL_TEACHER_KEY": key, "OMP_NUM_THREADS": str(config.threads)}
    child = await start("teacher server", "teacher_server", arguments, log=log, env=env, timeout_s=TEACHER_START_S)
    return child, key


async def _meet(url: str, key: str, config: ServerTeacher, process: Child | None) -> TeacherAddress:
    client = TeacherClient(url, key=key, deadline_s=config.deadline_s, concurrency=1)
    try:
        found = await client.capabilities()
    finally:
        await client.aclose()
    return TeacherAddress(
        url=url, key=key, identity=found.identity, context_length=found.context_length, process=process
    )


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


def _actor(cls: type, threads: int, *arguments: Any) -> Any:
    import ray

    options = {"num_cpus": 0, "runtime_env": {"env_vars": {**ACTOR_ENV, "OMP_NUM_THREADS": str(threads)}}}
    return ray.remote(cls).options(**options).remote(*arguments)


def _max_model_len(config: RunConfig) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.sampling.max_new_tokens


def _secret(reference: str) -> str:
    """The value behind env:NAME or file:PATH. Raises ConfigError naming the reference, never the value."""
    kind, _, name = reference.partition(":")
    if kind == "env":
        if name not in os.environ:
            raise ConfigError(f"teacher.secret_ref: the environment has no variable {name}")
        return os.environ[name]
    try:
        return Path(name).read_text().strip()
    except OSError as error:
        raise ConfigError(f"teacher.secret_ref: {name} cannot be read: {error.strerror}") from None
