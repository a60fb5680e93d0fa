"""Where a request waits for the database: never where it holds up others, and nothing is left behind when it stops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest
import sqlalchemy as sa

from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.engines import MORE_IN_LOOP, POOL
from orchestrator.service.waits import briefly, durably
from tests.databases import server, url
from tests.postgres import Postgres

__all__ = ["server", "url"]


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    opened = Store(Database(url))
    yield opened
    await opened.database.leave_loop()
    opened.close()


@pytest.fixture
async def remote(server: Postgres, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    opened = Store(Database(server.database(f"waits-{abs(hash(request.node.name))}")))
    yield opened
    await opened.database.leave_loop()
    opened.close()


def ask(store: Store, statement: str) -> object:
    with store.database.reading() as db:
        return db.exec_driver_sql(statement).scalar()


async def test_short_reads_take_no_thread(store: Store):
    assert await briefly(store, threading.get_ident) == threading.get_ident()
    assert await briefly(store, store.events.last, "nobody") == 0


async def test_a_write_takes_a_thread_where_it_waits_for_this_process_s_disk(store: Store):
    thread = await durably(store, threading.get_ident)
    assert (thread != threading.get_ident()) == store.database.is_near


async def test_what_is_written_is_there_for_everybody(store: Store):
    key, _ = await durably(store, store.keys.create, owner="ada", label="", scopes=[])
    assert (await briefly(store, store.keys.list))[0].id == key.id
    assert (await asyncio.to_thread(store.keys.list))[0].id == key.id


async def test_a_write_that_fails_leaves_nothing(store: Store):
    def fail() -> None:
        with store.database.writing() as db:
            db.execute(sa.text("DELETE FROM leases"))
            db.execute(sa.text("INSERT INTO leases (name, holder, token, expires_at) VALUES ('a', 'b', 1, 0)"))
            raise KeyError("a mistake")

    with pytest.raises(KeyError):
        await durably(store, fail)
    assert await briefly(store, ask, store, "SELECT count(*) FROM leases") == 0


async def test_who_reads_again_and_again_lets_others_have_their_turn(store: Store):
    async def read_on() -> None:
        while True:
            await briefly(store, store.ping)

    reading = asyncio.create_task(read_on())
    for _ in range(10):
        await asyncio.wait_for(briefly(store, store.ping), 5.0)
    assert not reading.done()
    reading.cancel()


async def test_a_server_that_is_slow_to_answer_holds_nobody_up(remote: Store):
    slow = asyncio.create_task(briefly(remote, ask, remote, "SELECT 'late' FROM pg_sleep(1)"))
    await asyncio.sleep(0.1)
    assert await briefly(remote, ask, remote, "SELECT 'soon'") == "soon"
    assert not slow.done()
    assert await slow == "late"


async def test_who_waits_for_another_s_lock_holds_nobody_up(remote: Store):
    key, _ = remote.keys.create(owner="ada", label="", scopes=[])

    def revoke() -> None:
        remote.keys.revoke(key.id)

    with remote.database.writing() as db:
        db.execute(sa.text("SELECT id FROM keys FOR UPDATE"))
        waiting = asyncio.create_task(durably(remote, revoke))
        await asyncio.sleep(0.2)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 5.0)


async def test_readers_that_give_up_leave_room_for_others(remote: Store):
    """More of them than there are connections."""
    room = POOL["pool_size"] + MORE_IN_LOOP
    asked = [asyncio.create_task(briefly(remote, ask, remote, "SELECT pg_sleep(30)")) for _ in range(room)]
    await asyncio.sleep(1.0)
    for task in asked:
        task.cancel()
    assert {type(one) for one in await asyncio.gather(*asked, return_exceptions=True)} == {asyncio.CancelledError}
    began = time.monotonic()
    answers = await asyncio.gather(*(briefly(remote, ask, remote, f"SELECT {n}") for n in range(2 * room)))
    assert list(answers) == list(range(2 * room))
    assert time.monotonic() - began < 20.0


async def test_connections_that_the_server_has_ended_are_opened_again(server: Postgres, remote: Store):
    assert await briefly(remote, ask, remote, "SELECT 1") == 1
    await asyncio.to_thread(server.cut, remote.database.engine.url.database)
    assert await briefly(remote, ask, remote, "SELECT 1") == 1


async def test_a_loop_that_was_left_holds_no_connection(remote: Store):
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    await asyncio.gather(*(briefly(remote, ask, remote, "SELECT pg_sleep(0.2)") for _ in range(5)))
    assert await asyncio.to_thread(ask, remote, count) >= 6
    await remote.database.leave_loop()
    deadline = time.monotonic() + 5.0
    while await asyncio.to_thread(ask, remote, count) > 1:
        assert time.monotonic() < deadline, "the loop's connections are still open"
        await asyncio.sleep(0.05)
