"""Who is here, who was lost, who comes instead: with workers that are only names."""

from __future__ import annotations

import asyncio
import doctest
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from orchestrator import roster as documented
from orchestrator.roster import LONGEST_PAUSE_S, PAUSE_S, Roster, Worker, pause_s
from potstill.errors import ConfigError, MemoryLost, WorkerLost


class Agency:
    """Hires workers; `failures` are what it says instead, by place, in turn. A place of `slow` waits for its event."""

    def __init__(
        self, failures: dict[int, list[Exception]] | None = None, slow: dict[int, asyncio.Event] | None = None
    ) -> None:
        self._failures = failures or {}
        self._slow = slow or {}
        self.asked: list[tuple[int, bool]] = []
        self.hired: Counter[int] = Counter()
        self.losses: list[tuple[int, str]] = []

    async def hire(self, number: int, anew: bool) -> Worker:
        self.asked.append((number, anew))
        await asyncio.sleep(0.001 * (number + 1))
        if number in self._slow:
            await self._slow[number].wait()
        if self._failures.get(number):
            raise self._failures[number].pop(0)
        self.hired[number] += 1
        return Worker(number=number, actor=f"{number}.{self.hired[number]}", version=0)

    def lose(self, number: int, error: WorkerLost) -> None:
        self.losses.append((number, str(error)))

    def roster(self, *, wanted: int, at_least: int | None = None, restarts: int = 3) -> Roster:
        at_least = wanted if at_least is None else at_least
        return Roster(self.hire, self.lose, wanted=wanted, at_least=at_least, restarts=restarts)


@pytest.fixture(autouse=True)
async def nothing_is_left() -> Any:
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def next_of(arrivals: AsyncIterator[Worker]) -> str:
    worker = await asyncio.wait_for(anext(arrivals), 5)
    return str(worker.actor)


def here(roster: Roster) -> list[str]:
    return [worker.actor for worker in roster.present]


async def test_a_run_begins_with_all_that_are_wanted_in_their_order():
    agency = Agency()
    roster = agency.roster(wanted=3)
    await roster.open()
    assert here(roster) == ["0.1", "1.1", "2.1"]
    arrivals = roster.arrivals()
    assert [await next_of(arrivals) for _ in range(3)] == here(roster)
    assert agency.asked == [(0, False), (1, False), (2, False)]
    assert agency.losses == []
    await roster.close()


async def test_who_is_lost_is_replaced_by_another_and_everybody_hears_of_it():
    agency = Agency()
    roster = agency.roster(wanted=2)
    await roster.open()
    arrivals = roster.arrivals()
    first, _ = await anext(arrivals), await anext(arrivals)
    roster.lost(first, WorkerLost("gone"))
    assert (here(roster), agency.losses) == (["1.1"], [(0, "gone")])
    assert await next_of(arrivals) == "0.2"
    assert agency.asked[-1] == (0, True)
    assert here(roster) == ["0.2", "1.1"]
    await roster.close()


async def test_to_be_told_twice_of_a_loss_changes_nothing():
    agency = Agency()
    roster = agency.roster(wanted=1, restarts=1)
    await roster.open()
    worker = roster.present[0]
    for _ in range(2):
        roster.lost(worker, WorkerLost("gone"))
    assert (await asyncio.wait_for(roster.somebody(), 5)).actor == "0.2"
    roster.lost(worker, WorkerLost("its last call says so too"))
    roster.worked(worker)
    assert (agency.losses, here(roster)) == ([(0, "gone")], ["0.2"])
    await roster.close()


async def test_all_who_wait_for_a_worker_get_the_one_that_comes():
    """Whoever waited first must not keep the news to himself."""
    roster = Agency().roster(wanted=1)
    await roster.open()
    arrivals = roster.arrivals()
    roster.lost(await anext(arrivals), WorkerLost("gone"))
    waiting = [asyncio.create_task(next_of(arrivals)), *[asyncio.create_task(roster.somebody()) for _ in range(3)]]
    found = await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert [found[0], *(worker.actor for worker in found[1:])] == ["0.2"] * 4
    await roster.close()


async def test_a_place_that_loses_its_worker_too_often_in_a_row_ends_the_run_with_the_last_cause():
    """Of its kind, too: who has no memory is not just lost."""
    roster = Agency({0: [WorkerLost("silent"), MemoryLost("no memory")]}).roster(wanted=1, restarts=1)
    with pytest.raises(MemoryLost, match="rollout worker 0 was lost 2 times in a row: no memory"):
        await asyncio.wait_for(roster.open(), 5)
    await roster.close()


async def test_a_worker_that_could_not_be_hired_is_told_of_as_one_that_was_lost():
    agency = Agency({1: [WorkerLost("it fell silent while it loaded")]})
    roster = agency.roster(wanted=2)
    await asyncio.wait_for(roster.open(), 5)
    assert (here(roster), agency.losses) == (["0.1", "1.1"], [(1, "it fell silent while it loaded")])
    await roster.close()


async def test_a_run_begins_at_once_with_the_fewest_workers_and_the_others_join():
    last = asyncio.Event()
    agency = Agency(slow={0: asyncio.Event(), 2: last})
    roster = agency.roster(wanted=3, at_least=1)
    await asyncio.wait_for(roster.open(), 5)
    assert here(roster) == ["1.1"]
    last.set()
    arrivals = roster.arrivals()
    assert [await next_of(arrivals), await next_of(arrivals)] == ["1.1", "2.1"]
    await roster.close()


async def test_with_no_restarts_the_first_loss_ends_the_run():
    roster = Agency().roster(wanted=2, restarts=0)
    await roster.open()
    arrivals = roster.arrivals()
    worker, _ = await anext(arrivals), await anext(arrivals)
    roster.lost(worker, WorkerLost("gone"))
    with pytest.raises(WorkerLost, match="lost 1 times in a row: gone"):
        await next_of(arrivals)
    await roster.close()


async def test_work_that_is_done_makes_a_place_sound_again():
    roster = Agency().roster(wanted=1, restarts=1)
    await roster.open()
    for _ in range(3):
        worker = await asyncio.wait_for(roster.somebody(), 5)
        roster.worked(worker)
        roster.lost(worker, WorkerLost("gone"))
    assert (await asyncio.wait_for(roster.somebody(), 5)).actor == "0.4"
    await roster.close()


async def test_what_another_worker_would_not_mend_is_raised_at_once():
    error = ConfigError("rollout.engine: no such model")
    roster = Agency({1: [error]}).roster(wanted=2)
    with pytest.raises(ConfigError) as caught:
        await asyncio.wait_for(roster.open(), 5)
    assert caught.value is error
    await roster.close()


async def test_a_run_that_has_begun_hears_of_a_worker_that_says_that_it_is_wrong():
    roster = Agency({1: [ConfigError("rollout.engine: no such model")]}).roster(wanted=2, at_least=1)
    await asyncio.wait_for(roster.open(), 5)
    arrivals = roster.arrivals()
    assert await next_of(arrivals) == "0.1"
    with pytest.raises(ConfigError, match="no such model"):
        await next_of(arrivals)
    await roster.close()


async def test_everybody_hears_what_ends_the_run():
    roster = Agency({0: [WorkerLost("never there")]}, slow={1: asyncio.Event()}).roster(wanted=2, restarts=0)
    opening = asyncio.create_task(roster.open())
    waiting = [asyncio.create_task(roster.somebody()), asyncio.create_task(next_of(roster.arrivals()))]
    ends = await asyncio.wait_for(asyncio.gather(opening, *waiting, return_exceptions=True), 5)
    assert [type(end) for end in ends] == [WorkerLost] * 3
    await roster.close()


async def test_a_run_that_is_closed_hires_nobody_any_more():
    agency = Agency(slow={0: asyncio.Event()})
    roster = agency.roster(wanted=1)
    opening = asyncio.create_task(roster.open())
    await asyncio.sleep(0.01)
    await roster.close()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert agency.asked == [(0, False)]


def test_the_pause_before_another_doubles_and_is_bounded():
    pauses = [pause_s(losses) for losses in range(1, 12)]
    assert pauses[0] == PAUSE_S
    assert all(later == min(2 * earlier, LONGEST_PAUSE_S) for earlier, later in itertools.pairwise(pauses))
    assert pause_s(100_000) == LONGEST_PAUSE_S
    assert doctest.testmod(documented).failed == 0
