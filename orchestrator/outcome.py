"""What became of a call to a process of the run: its result, or the error of ours that it means; and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from orchestrator import memory
from potstill.errors import CapacityError, LearnerLost, MemoryLost, PotstillError, RunError, WorkerLost
from potstill.processes import Child


async def outcome(who: str, call: Awaitable[Any]) -> Any:
    """Raises what the process raised, CapacityError where it asked for more memory than there is; when it is gone
    WorkerLost (LearnerLost for the learner), or MemoryLost where it was ended for its memory."""
    gone = LearnerLost if who == "learner" else WorkerLost
    try:
        return await call
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PotstillError):
            raise cause from None
        if isinstance(cause, ObjectLostError):
            raise WorkerLost(f"the {who} could not read what a process left that has died") from error
        if memory.was_refused(cause):
            raise CapacityError(f"the {who} has run out of memory ({cause}): {memory.advice(who)}") from error
        raise RunError(f"the {who} failed: {type(cause).__name__}: {cause}") from error
    except OutOfMemoryError as error:
        raise MemoryLost(
            f"the {who}'s process was ended by Ray, as its node had hardly any memory left: {memory.advice(who)}"
        ) from error
    except RayActorError as error:
        raise memory.loss(who, gone, f"the {who}'s process died; its log is in Ray's session folder") from error
    except ObjectLostError as error:
        raise gone(f"the {who}'s answer is lost with the machine that held it") from error


async def revocable(who: str, call: Awaitable[Any]) -> Any:
    """As `outcome`; a call that nobody waits for any more is cancelled where it runs."""
    import ray

    try:
        return await outcome(who, call)
    except asyncio.CancelledError:
        ray.cancel(call)
        raise


async def died(server: Child) -> None:
    """Wait for the end of a server that the run started. Raises WorkerLost or MemoryLost unless it was asked for."""
    try:
        await server.died()
    except WorkerLost as error:
        raise memory.loss(server.name, WorkerLost, str(error)) from None


async def end(actor: Any) -> None:
    """End the actor's process. Calls to it fail at once; a process that is frozen, and hears nothing, is killed by its
    node 5 seconds later."""
    import ray

    ray.kill(actor)
