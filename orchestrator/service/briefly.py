"""Reads that are answered soon, in a few threads of the process: whoever waits for one waits in the event loop.

Threads that are inside the database's driver take the interpreter from one another several times a statement: with the
forty that routes may have, all of them wait for it (decision 0018). What writes or may take long keeps out of here, so
that nobody waits for a lock, a disk or a file in one of these threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")
THREADS = 4

_few = ThreadPoolExecutor(THREADS, thread_name_prefix="briefly")


async def briefly(read: Callable[..., Result], *args: Any, **options: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(_few, partial(read, *args, **options))
