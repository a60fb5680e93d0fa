"""Where a request waits for the database: what is asked all the time, of SQLite and of PostgreSQL.

    SQLite        short reads in the event loop: they wait for nobody, and a thread costs more than they do
                  writes in a thread: they wait for their turn and for the disk
    PostgreSQL    both in the event loop, in a greenlet: the store's functions stay as they are, and where one waits for
                  the server others go on. Threads in its driver take the interpreter from one another at every step

Measured in decision 0018. What reads much, reads files, or asks others is no work for here: it goes through a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.util import greenlet_spawn
from starlette.concurrency import run_in_threadpool

from orchestrator.service.store import Store

Result = TypeVar("Result")


async def briefly(store: Store, read: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """What `read` finds in the store."""
    if store.database.is_near:
        await asyncio.sleep(0)  # whoever reads again and again lets others have their turn
        return read(*args, **options)
    return await greenlet_spawn(read, *args, **options)


async def durably(store: Store, write: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """What `write` answers, once the store has it on disk."""
    if store.database.is_near:
        return await run_in_threadpool(write, *args, **options)
    return await greenlet_spawn(write, *args, **options)
