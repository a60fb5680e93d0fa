"""A run that is asked to stop: what ends at once, and what is finished first.

    opening, evaluations, canaries    end at once
    the step that is being made       is finished, and a checkpoint left: buffer.py gives no batch after it

What ends at once is done again by whoever resumes the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from orchestrator.buffer import Closed
from orchestrator.tasks import until

Answer = TypeVar("Answer")


async def unless_asked(stopping: asyncio.Event, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What `work` returns. Raises Closed, and cancels `work`, as soon as the run is asked to stop."""
    if stopping.is_set():
        work.close()
        raise Closed
    return await until(work, _closed(stopping))


async def _closed(stopping: asyncio.Event) -> NoReturn:
    await stopping.wait()
    raise Closed
