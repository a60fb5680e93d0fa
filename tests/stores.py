"""A store on each database, what is put into it, and who looks. `store` and `light` are fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.reporting import Report
from orchestrator.service.principals import Limits, Principal, Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.runs import NewRun

ALICE = Principal(key_id="a", owner="alice", scopes=frozenset({Scope.RUNS_READ}), limits=Limits())
BOB = Principal(key_id="b", owner="bob", scopes=frozenset({Scope.RUNS_READ}), limits=Limits())
ROOT = Principal(key_id="r", owner="operator", scopes=frozenset({Scope.ADMIN}), limits=Limits())


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(Database(url))
    yield opened
    opened.close()


@pytest.fixture
def light(tmp_path: Path) -> Iterator[Store]:
    """On SQLite alone."""
    opened = Store(Database(f"sqlite:///{tmp_path / 'potstill.db'}"))
    yield opened
    opened.close()


def create(
    store: Store,
    name: str = "one",
    *,
    key: str | None = None,
    body: str = "b",
    who: Principal = ALICE,
    gpus: float = 0.0,
):
    config, metadata = {"name": name}, {"of": name}
    new = NewRun(id=name, submitted=config, config=config, owner=who.owner, metadata=metadata, gpus=gpus)
    return store.runs.create(new, Once(key_id=who.key_id, key=key, route="/v1/runs", body_digest=body))


def event(number: int, **changes: Any) -> dict[str, Any]:
    return {"seq": number, "time": 1.0, "type": "t", "level": "info", "message": f"m{number}", "data": {}} | changes


def events(*numbers: int, statuses: list | None = None) -> Report:
    return Report.model_validate({"events": [event(number) for number in numbers], "statuses": statuses or []})


def status(name: str, when: float = 2.0) -> Report:
    return events(statuses=[{"status": name, "time": when, "pid": 1}])


def told(store: Store, name: str = "one") -> list[str]:
    """Messages of the run's own events, as the database holds them."""
    return [event.message for event in store.events.list(name, after=0, limit=10_000) if event.type == "t"]
