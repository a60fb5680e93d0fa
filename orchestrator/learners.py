"""The learner's ranks, asked together: what they answer is rank 0's, and the loss of one is the loss of all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

from orchestrator.outcome import outcome
from orchestrator.pulse import actor_pulse
from orchestrator.tasks import until
from potstill.config import RunConfig
from potstill.errors import LearnerLost, PotstillError, RunError
from potstill.fencing import Fence
from potstill.transports.route import Route
from potstill.types import StartingPoint
from potstill.wire import Capabilities

LEARNER = "learner"
OTHERS_S = 10.0  # that ranks have to fail, too, once one of them has


class Learners:
    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = tuple(actors)

    async def open(self, config: RunConfig, met: Capabilities | None, fence: Fence, route: Route) -> StartingPoint:
        """Have them meet and load the student where the run stands."""
        start: StartingPoint = await self.watched(self._open(config, met, fence, route), config.loop.silence_s)
        return start

    async def watched(self, work: Coroutine[Any, Any, Any], silence_s: float) -> Any:
        """What `work` returns. Raises LearnerLost when a rank is silent for too long meanwhile."""
        return await until(work, *(actor_pulse(LEARNER, actor, silence_s, LearnerLost) for actor in self.actors))

    async def all(self, method: str, *arguments: Any) -> Any:
        """Have every rank do it. Raises LearnerLost when one of them is gone."""
        return await self._together([getattr(actor, method).remote(*arguments) for actor in self.actors])

    async def first(self, method: str, *arguments: Any) -> Any:
        """Have rank 0 do it: what needs no other."""
        return await outcome(LEARNER, getattr(self.actors[0], method).remote(*arguments))

    async def _open(self, config: RunConfig, met: Capabilities | None, fence: Fence, route: Route) -> Any:
        gathering = await self.first("gather", fence, len(self.actors))
        return await self._together(
            [actor.open.remote(config, met, fence, rank, gathering, route) for rank, actor in enumerate(self.actors)]
        )

    async def _together(self, calls: Sequence[Awaitable[Any]]) -> Any:
        tasks = [asyncio.create_task(outcome(LEARNER, call)) for call in calls]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.done() and task.exception() for task in tasks):
                await asyncio.wait(tasks, timeout=OTHERS_S)
                raise min((e for task in tasks if task.done() and (e := task.exception())), key=_hearsay)
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()


def _hearsay(error: BaseException) -> int:
    """How likely it is that the error is of another rank's failure: a rank whose neighbour left fails as well."""
    if isinstance(error, LearnerLost):
        return 1
    return 0 if isinstance(error, PotstillError) and type(error) is not RunError else 2
