"""One reader of the database for each followed run; a follower hears everything once, or is let go of."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.reporting import Report
from orchestrator.service import following
from orchestrator.service.following import Following
from orchestrator.service.principals import Limits, Principal
from orchestrator.service.runs import State
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.runs import NewRun
from potstill.errors import ServiceError

WHO = Principal(key_id="a", owner="alice", scopes=frozenset(), limits=Limits(streams=2))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(Database(f"sqlite:///{tmp_path / 'potstill.db'}"))
    new = NewRun(id="one", submitted={}, config={}, owner="alice")
    opened.runs.create(new, Once(key_id="a", key=None, route="", body_digest=""))
    yield opened
    opened.close()


def tell(store: Store, first: int, count: int) -> None:
    rows = [
        {"seq": n, "time": 1.0, "type": "t", "level": "info", "message": "m" * 50, "data": {}}
        for n in range(first, first + count)
    ]
    store.runs.report("one", Report.model_validate({"events": rows}))


def numbers(sent: bytes) -> list[int]:
    return [int(line[4:]) for line in sent.decode().splitlines() if line.startswith("id: ")]


async def test_followers_from_anywhere_hear_the_rest_once_and_then_the_end(store: Store):
    tell(store, 1, 50)
    followed = Following(store, poll_s=0.01)

    async def follow(after: int) -> bytes:
        return b"".join([sent async for sent in followed.stream("one", after, WHO)])

    readers = [asyncio.create_task(follow(after)) for after in (0, 10, 51)]
    for first in range(51, 151, 20):
        await asyncio.sleep(0.02)
        await asyncio.to_thread(tell, store, first, 20)
    late = asyncio.create_task(follow(20))
    await asyncio.to_thread(store.runs.move, "one", State.CANCELLED, "enough")
    heard = await asyncio.gather(*readers, late)
    last = store.events.last("one")
    assert [numbers(sent) for sent in heard] == [list(range(after + 1, last + 1)) for after in (0, 10, 51, 20)]
    assert all(sent.decode().count("event: end") == 1 for sent in heard)
    assert followed.followers == 0


async def test_a_follower_that_does_not_keep_up_is_let_go_of_and_not_told_that_it_has_heard_all(store: Store):
    followed = Following(store, poll_s=0.001)
    stream = followed.stream("one", 0, WHO)
    await anext(stream)
    slow = asyncio.create_task(anext(stream))
    await slow  # it has heard the first event, and reads no more
    for first in range(1, 2 * following.BEHIND + 1):
        await asyncio.to_thread(tell, store, first, 1)
        await asyncio.sleep(0.005)
    await asyncio.to_thread(store.runs.move, "one", State.CANCELLED, "enough")
    await asyncio.sleep(0.05)
    rest = b"".join([sent async for sent in stream])
    assert b"event: end" not in rest
    assert numbers(rest) == []


async def test_a_follower_whom_the_services_end_overtakes_is_not_told_that_it_has_heard_all(store: Store):
    followed = Following(store, poll_s=0.001)
    stream = followed.stream("one", 0, WHO)
    await anext(stream)
    await anext(stream)  # the first event; what comes now waits for it
    await asyncio.to_thread(tell, store, 1, 5)
    await asyncio.sleep(0.05)
    await asyncio.to_thread(store.runs.move, "one", State.CANCELLED, "enough")
    await asyncio.sleep(0.05)
    followed.end()
    assert b"".join([sent async for sent in stream]) == b""
    assert followed.followers == 0


async def test_who_follows_a_silent_run_hears_that_the_line_lives(store: Store):
    stream = Following(store, poll_s=0.01, keepalive_s=0.02).stream("one", 1, WHO)
    assert [numbers(await anext(stream)) for _ in range(4)] == [[]] * 4
    tell(store, 1, 1)
    heard = b""
    while not numbers(heard):
        heard = await anext(stream)
    assert numbers(heard) == [2]
    await stream.aclose()


async def test_a_key_has_as_many_streams_as_it_may(store: Store):
    followed = Following(store, poll_s=0.01)
    streams = [followed.stream("one", 0, WHO) for _ in range(2)]
    for stream in streams:
        await anext(stream)
        await anext(stream)
    with pytest.raises(ServiceError, match="too many"):
        followed.admit(WHO)
    await streams[0].aclose()
    followed.admit(WHO)
    await streams[1].aclose()
