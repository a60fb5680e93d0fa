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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator import cluster
from orchestrator.crew import WORKER, Crew
from orchestrator.learners import LEARNER, Learners
from orchestrator.outcome import end, outcome
from orchestrator.placement import Placement
from orchestrator.pulse import LOADING_S, actor_pulse, first_answer
from orchestrator.roster import Roster, Worker
from orchestrator.tasks import together, until
from orchestrator.teachers import Faculty
from potstill.config import RunConfig, ScratchConfig
from potstill.errors import LearnerLost, WorkerLost
from potstill.fencing import Fence
from potstill.journal import Journal
from potstill.teachers.opening import ALLOWED
from potstill.transports.route import route_of
from potstill.types import StartingPoint

POLL_S = 0.2
ACTOR_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    **{name: os.environ[name] for name in (ALLOWED,) if name in os.environ},
}


class Site:
    """A connection to Ray with a learner and rollout workers, without a run. Actors start when they are first needed,
    and again when they were lost."""

    def __init__(self, config: RunConfig) -> None:
        self._first = config
        self._gang = cluster.Gang()
        self._learners: list[Any] = []
        self._new: list[Any] = []  # of the learners: those who have not answered yet
        self._workers: dict[int, Any] = {}
        self._placed: set[int] = set()  # workers that have found room

    @contextlib.asynccontextmanager
    async def open(
        self, config: RunConfig, faculty: Faculty, fence: Fence, journal: Journal
    ) -> AsyncIterator[tuple[Crew, StartingPoint]]:
        """Have every process load what the run needs, from its newest sound checkpoint where it has one.

        Raises ConfigError when one of them cannot, CapacityError when the cluster has no room for them in time.
        """
        nearby = bool(faculty.processes) and not cluster.is_own()  # teachers of ours listen on loopback
        placement = Placement.of(config, host=cluster.this_host() if nearby else None)
        learners = await self._ranks(config, placement)
        route = route_of(config, same_host=cluster.on_one_host())
        journal.event("weights.route", f"weights travel by {route.transport}: {route.reason}", **asdict(route))
        roster = Roster(
            lambda number, anew: self._hire(number, config, faculty, fence, anew=anew),
            lambda number, error: _lost(journal, number, error),
            wanted=config.rollout.workers,
            at_least=config.rollout.min_workers,
            restarts=config.loop.restarts,
        )

        async def loaded() -> StartingPoint:
            await self._begin(config)
            return await learners.open(config, faculty.met, fence, route)

        try:  # side by side: each loads its libraries for seconds
            start, *_ = await together(loaded(), roster.open(), self._enough(config, placement))
            crew = Crew(
                config,
                learners=learners,
                roster=roster,
                published=start.published,
                journal=journal,
                teachers=faculty.processes,
            )
            yield crew, start
        finally:
            await roster.close()

    async def create(self, folder: Path, architecture: ScratchConfig, *, texts: list[str], seed: int) -> None:
        """Write a model folder from nothing, replacing what is there."""
        learners = await self._ranks(self._first, Placement.of(self._first))
        await self._begin(self._first)
        creating = learners.first("create", str(folder), architecture, texts, seed)
        await learners.watched(creating, self._first.loop.silence_s)

    async def dismiss_learners(self) -> None:
        """End those that are left of a learner that lost a rank, or that fell silent."""
        for actor in self._learners:
            await end(actor)
        self._learners, self._new = [], []

    async def _ranks(self, config: RunConfig, placement: Placement) -> Learners:
        """Have as many as there are ranks, where they have room; those who are new have yet to begin."""
        from learner.actor import Learner

        if not self._gang.suits(placement):
            await self.dismiss_learners()
            await self._dismiss_workers()
            self._gang.release()
        await self._gang.gather(placement, config.resources.wait_s)
        places = range(len(self._learners), config.learner.ranks)
        new = [_actor(Learner, config.learner.threads, self._gang.rank(number)) for number in places]
        self._learners += new
        self._new += new
        return Learners(self._learners[: config.learner.ranks])

    async def _begin(self, config: RunConfig) -> None:
        silence_s = config.loop.silence_s
        await together(*[_enter(LEARNER, actor, silence_s, LearnerLost) for actor in self._new])
        self._new = []

    async def _hire(self, number: int, config: RunConfig, faculty: Faculty, fence: Fence, *, anew: bool) -> Worker:
        """Have the worker of a place open the run; `anew`: in another process than the one that was there."""
        from rollout_worker.actor import RolloutWorker

        if anew and number in self._workers:
            self._placed.discard(number)
            await end(self._workers.pop(number))
        berth = await self._gang.worker(number)
        self._placed.add(number)
        if number not in self._workers:
            self._workers[number] = _actor(RolloutWorker, config.rollout.threads, berth)
        actor, silence_s = self._workers[number], config.loop.silence_s
        await _enter(WORKER, actor, silence_s, WorkerLost)
        await until(
            outcome(WORKER, actor.open.remote(config, faculty.accesses, faculty.met, number, fence)),
            actor_pulse(WORKER, actor, silence_s, WorkerLost),
        )
        return Worker(number=number, actor=actor, version=0)

    async def _enough(self, config: RunConfig, placement: Placement) -> None:
        """Wait until the workers that a run begins with have found room. Raises CapacityError when it takes too long.
        The others may wait for ever: they join when there is room."""
        wait_s, wanted = config.resources.wait_s, min(config.rollout.min_workers, config.rollout.workers)
        if not placement.worker:
            return
        try:
            async with asyncio.timeout(wait_s):
                while len(self._placed) < wanted:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            what, strategy = "rollout workers", "each where there is room"
            raise cluster.lacking(what, [placement.worker] * wanted, strategy=strategy, waited_s=wait_s) from None

    async def _dismiss_workers(self) -> None:
        for actor in self._workers.values():
            await end(actor)
        self._workers.clear()
        self._placed.clear()


@contextlib.asynccontextmanager
async def site(config: RunConfig) -> AsyncIterator[Site]:
    """Connect to Ray: RAY_ADDRESS, or a local one that ends with us. `config`: of the first run."""
    import ray

    await asyncio.to_thread(cluster.connect, ACTOR_ENV)
    _take_back_sigterm()
    try:
        yield Site(config)
    finally:
        await asyncio.to_thread(ray.shutdown)


def _take_back_sigterm() -> None:
    """Ray takes SIGTERM for a crash: it prints a stack and aborts us three seconds later, in the middle of cleaning up.

    Registering Python's handler once more puts it back in the place of Ray's.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.siginterrupt(signal.SIGTERM, False)


def _actor(cls: type, threads: int, berth: cluster.Berth) -> Any:
    return cluster.actor(cls, berth, {**ACTOR_ENV, "OMP_NUM_THREADS": str(threads)})


async def _enter(who: str, actor: Any, silence_s: float, gone: type[WorkerLost]) -> None:
    """Returns once the actor has begun, in the folder that we are in. Raises `gone` when it does not."""
    entering = actor.__ray_call__.remote(cluster.enter, os.getcwd())
    await first_answer(who, actor, entering, LOADING_S + silence_s, gone)


def _lost(journal: Journal, number: int, error: WorkerLost) -> None:
    message = f"rollout worker {number}: {error}"
    journal.event("worker.lost", message, level="warn", number=number, category=error.category)
