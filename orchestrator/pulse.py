"""Signs of life: a process that owes one and gives none for too long is ended, and counts as lost.

A frozen process looks like a busy one, so patience is long; and while it is us who are frozen, hardly any of it passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any

import httpx2
import psutil

from orchestrator.outcome import end, outcome
from potstill.calling.guard import LOOPBACK, Guard
from potstill.errors import RunError, WorkerLost
from potstill.processes import Child

LOADING_S = 60.0  # that a first answer may take longer: it comes when torch is imported, in 5 s by a core of its own,
# in a minute where many processes read it at once from a disk that they share
PARTS = 4  # of a silence: when we wake after hours one of them has passed
RETRY_S = 0.5
RAYS_PARTS = ("raylet", "gcs_server")


async def actor_pulse(name: str, actor: Any, silence_s: float, gone: type[WorkerLost]) -> None:
    """Raises `gone` when the actor's process has died, or has been silent for too long and was ended."""
    while True:
        if not await _answers(outcome(name, actor.beat.remote()), silence_s):
            await end(actor)
            raise gone(_silent(name, silence_s))
        await asyncio.sleep(silence_s / PARTS)


async def first_answer(name: str, actor: Any, call: Awaitable[object], limit_s: float, gone: type[WorkerLost]) -> None:
    """Wait for the first call to an actor that has its room; until then it has no pulse. Raises what the call raises,
    and `gone` when there was no answer in time and its process was ended."""
    if not await _answers(outcome(name, call), limit_s):
        await end(actor)
        raise gone(_silent(name, limit_s))


async def server_pulse(child: Child, silence_s: float) -> None:
    """Raises WorkerLost when a server that the run started has died, or has been silent for too long and was ended."""
    async with Guard(LOOPBACK).client(child.ready["url"], timeout=httpx2.Timeout(None)) as http:
        while await _answers(_alive(http), silence_s):
            await asyncio.sleep(silence_s / PARTS)
    await child.kill()
    raise WorkerLost(_silent(child.name, silence_s))


async def ray_pulse() -> None:
    """Raises RunError when a part of the Ray that this process started has died. Of another's Ray it sees nothing."""
    parts = {part: part.name() for part in psutil.Process().children() if part.name() in RAYS_PARTS}
    while True:
        for part, name in parts.items():
            if not part.is_running() or part.status() == psutil.STATUS_ZOMBIE:
                raise RunError(f"Ray's {name} has died, and all that ran on it is lost; resume the run on another Ray")
        await asyncio.sleep(RETRY_S)


async def _answers(call: Coroutine[Any, Any, object], silence_s: float) -> bool:
    """Whether the call ends in time; raises what it raises."""
    task = asyncio.create_task(call)
    try:
        for _ in range(PARTS):
            if (await asyncio.wait({task}, timeout=silence_s / PARTS))[0]:
                await task
                return True
        return False
    finally:
        task.cancel()


async def _alive(http: httpx2.AsyncClient) -> None:
    """Any answer is a sign of life. A connection that breaks is none; whether the process has ended, others see."""
    while True:
        try:
            await http.get("/livez")
        except httpx2.TransportError:
            await asyncio.sleep(RETRY_S)
        else:
            return


def _silent(name: str, silence_s: float) -> str:
    return f"the {name} has given no sign of life for {silence_s:g} s and was ended"
