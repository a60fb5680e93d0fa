"""What became of a call to a process of the run: its result, or the error of ours that it means; and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from potstill.errors import LearnerLost, PotstillError, RunError, WorkerLost


async def outcome(who: str, call: Awaitable[Any]) -> Any:
    """Raises what the process raised, WorkerLost (LearnerLost for the learner) when it is gone."""
    gone = LearnerLost if who == "learner" else WorkerLost
    try:
        return await call
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PotstillError):
            raise cause from None
        if isinstance(cause, ObjectLostError):
            raise WorkerLost(f"the {who} could not read what a process left that has died") from error
        raise RunError(f"the {who} failed: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        raise gone(f"the {who}'s process died; its log is in Ray's session folder") from error
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


async def end(actor: Any) -> None:
    """End the actor's process. Calls to it fail at once; a process that is frozen, and hears nothing, is killed by its
    node 5 seconds later."""
    import ray

    ray.kill(actor)
