"""A database that has been in use: finished runs with their events, and a few runs that are at work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from orchestrator.service.principals import Limits, Scope
from orchestrator.service.runs import State
from orchestrator.service.store import Store
from orchestrator.service.store.schema import EVENTS, RUNS
from tests.service_configs import submitted

OWNER = "bench"
AT_A_TIME = 20_000  # rows of one statement
LIMITS = Limits(streams=10_000)  # of event streams, which the bench opens on purpose


def busy(number: int) -> str:
    """The name of a run that is at work."""
    return f"busy-{number}"


def submission_id(run_id: str) -> str:
    return f"potstill-{run_id}-bench"


def fill(store: Store, config: dict[str, Any], *, runs: int, at_work: int, events: int) -> str:
    """Insert them; returns a key that may read and make runs. `config`: what each run resolved to."""
    key, text = store.keys.create(owner=OWNER, label="bench", scopes=[Scope.RUNS_READ, Scope.RUNS_WRITE], limits=LIMITS)
    names = [busy(number) for number in range(at_work)] + [f"done-{number}" for number in range(runs - at_work)]
    with store.database.writing() as db:
        db.execute(RUNS.insert(), [_run(name, key.id, config, working=name.startswith("busy")) for name in names])
    for rows in _batches(names, events // runs):
        with store.database.writing() as db:
            db.execute(EVENTS.insert(), rows)
    with store.database.writing() as db:
        if db.dialect.name == "postgresql":
            db.exec_driver_sql("ANALYZE")  # as its autovacuum has done where rows came in the course of weeks
    assert text is not None, "no request has made it before"
    return text


def _run(name: str, key_id: str, config: dict[str, Any], *, working: bool) -> dict[str, Any]:
    now = time.time()
    return {
        "id": name,
        "owner": OWNER,
        "key_id": key_id,
        "status": (State.RUNNING if working else State.SUCCEEDED).value,
        "status_since": now,
        "status_message": "",
        "submitted": submitted(name=name),
        "config": {**config, "name": name},
        "submission_id": submission_id(name),
        "attempt": 1,
        "revision": 1,
        "priority": 0,
        "metadata": {"team": "bench"},
        "notes": "",
        "step": 100,
        "latest": {"step": 100, "loss": 0.5, "tokens_trained": 1e5},
        "config_sha256": None,
        "heartbeat_at": now,
        "code_version": None,
        "created_at": now,
        "started_at": now,
        "finished_at": None if working else now,
        "launched_at": now if working else None,
        "gpus": 0.0,
        "busy_s": 60.0,
        "teacher_tokens": 0,
        "teacher_usd": 0.0,
    }


def _batches(names: list[str], each: int) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += [_event(name, seq) for seq in range(1, each + 1)]
        if len(rows) >= AT_A_TIME:
            yield rows
            rows = []
    if rows:
        yield rows


def _event(name: str, seq: int) -> dict[str, Any]:
    return {
        "run_id": name,
        "seq": seq,
        "stream": "events",
        "report_seq": seq,
        "time": 1.0,
        "type": "step.finished",
        "level": "info",
        "message": f"made {seq}",
        "data": {"step": seq, "loss": 0.5, "seconds": 1.0},
    }
