"""Where a short read is done: SQLite's in the event loop, PostgreSQL's in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from orchestrator.service.briefly import briefly
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from tests.databases import server, url

__all__ = ["server", "url"]


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(Database(url))
    yield opened
    opened.close()


async def test_only_a_database_in_this_process_is_read_in_the_event_loop(store: Store):
    thread = await briefly(store, threading.get_ident)
    assert (thread == threading.get_ident()) == store.database.is_near
    assert await briefly(store, store.events.last, "nobody") == 0


async def test_who_reads_again_and_again_lets_others_have_their_turn(store: Store):
    async def read_on() -> None:
        while True:
            await briefly(store, store.ping)

    reading = asyncio.create_task(read_on())
    for _ in range(10):
        await asyncio.wait_for(briefly(store, store.ping), 5.0)
    assert not reading.done()
    reading.cancel()
