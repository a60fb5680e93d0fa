"""Reads that are answered soon. SQLite is read in the event loop, PostgreSQL in a few threads of the process.

A read of SQLite waits for nobody and takes a millisecond or two: to hand it to a thread and back costs as much, and on
a busy machine far more, because threads wait for the interpreter and for each other (decision 0018). Threads that are
inside PostgreSQL's driver take the interpreter from one another several times a statement: whoever waits for one of the
few waits in the event loop. What writes, reads much, or may wait for a lock or a file keeps out of here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from orchestrator.service.store import Store

Result = TypeVar("Result")
THREADS = 4

_few = ThreadPoolExecutor(THREADS, thread_name_prefix="briefly")


async def briefly(store: Store, read: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """What `read` finds in the store."""
    if store.database.is_near:
        await asyncio.sleep(0)  # whoever reads again and again lets others have their turn
        return read(*args, **options)
    return await asyncio.get_running_loop().run_in_executor(_few, partial(read, *args, **options))
