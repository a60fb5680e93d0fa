"""The numbers of the steps that count, all or from one on, on both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.reporting import Report
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.runs import NewRun
from tests.databases import server, url

__all__ = ["server", "url"]  # fixtures

WENT_BACK = [*range(1, 11), *range(6, 9)]  # a run that has done ten steps, went back to 5 and is at 8 again
LARGE = 2**52


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(Database(url))
    new = NewRun(id="one", submitted={}, config={"name": "one"}, owner="alice")
    opened.runs.create(new, Once(key_id="a", key=None, route="/v1/runs", body_digest="b"))
    yield opened
    opened.close()


def report(store: Store, steps: list[int]) -> None:
    rows = [{"seq": seq, "time": 1.0, "step": step, "number": float(seq)} for seq, step in enumerate(steps, 1)]
    store.runs.report("one", Report.model_validate({"metrics": rows}))


@pytest.mark.parametrize("after", range(12))
def test_the_steps_after_one_are_the_end_of_all_steps_also_of_a_run_that_went_back(after: int, store: Store):
    report(store, WENT_BACK)
    whole = store.events.metrics("one")
    assert [(row["step"], row["number"]) for row in whole] == [
        *((n, n) for n in range(1, 6)),
        (6, 11),
        (7, 12),
        (8, 13),
    ]
    assert store.events.metrics("one", after_step=after) == [row for row in whole if row["step"] > after]


def test_a_step_of_any_size_is_read_and_a_run_without_steps_has_none(store: Store):
    assert store.events.metrics("one") == []
    report(store, [1, LARGE])
    assert [row["step"] for row in store.events.metrics("one", after_step=LARGE - 1)] == [LARGE]
