"""Tasks that live and die together. No task outlives the call that started it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Answer = TypeVar("Answer")


async def until(main: Coroutine[Any, Any, Answer], *others: Coroutine[Any, Any, None]) -> Answer:
    """What `main` returns. Raises what the first of them to fail raised, `main` first; the rest is cancelled."""
    first, rest = asyncio.create_task(main), [asyncio.create_task(other) for other in others]
    pending: set[asyncio.Task[Any]] = {first, *rest}
    try:
        while first in pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done if first in pending else ():
                _result(task)
        return _result(first)
    finally:
        for task in (first, *rest):
            task.cancel()
        await asyncio.gather(first, *rest, return_exceptions=True)


async def together(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """All results. Raises what the first of them to fail raised; the rest is cancelled."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _result(task: asyncio.Task[Answer]) -> Answer:
    """What the task returned, or raised; of a group of failures the first, which was the cause of the others' end."""
    try:
        return task.result()
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
