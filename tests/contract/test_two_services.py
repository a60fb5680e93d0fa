"""Two services over one PostgreSQL: one steers the runs, the other takes over, and nothing is written twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from orchestrator.service.principals import Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.schema import LEASES
from potstill.client import Client
from potstill.errors import ServiceError
from tests.databases import server
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service_configs import small_files, submitted
from tests.services import RUN, until

__all__ = ["server"]

STEPS = 60  # of 50 ms each: long enough to be taken over in the middle


@dataclass(frozen=True, kw_only=True)
class Pair:
    store: Store
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]]
    clients: dict[str, Client]

    def leader(self) -> str | None:
        with self.store.database.reading() as db:
            row = db.execute(sa.select(LEASES.c.holder)).first()
        return None if row is None else str(row.holder)

    def end_of(self, name: str) -> str:
        return until(lambda: self.store.runs.get(name).state.final and self.store.runs.get(name).state.value, 60.0)


@pytest.fixture
def pair(server: Postgres, tmp_path: Path) -> Iterator[Pair]:
    database = server.database(f"pair{tmp_path.name.replace('-', '')}")
    small_files(tmp_path)
    store = Store(Database(database))
    _, key = store.keys.create(owner="operator", label="", scopes=[Scope.ADMIN])
    with ExitStack() as stack:
        stack.callback(store.close)
        processes, clients = {}, {}
        for name in ("one", "two"):
            port = free_port()
            command = [sys.executable, "-m", "tests.launchers", str(tmp_path), str(port), RUN, database, name]
            processes[name] = stack.enter_context(subprocess.Popen(command))
            stack.callback(processes[name].kill)
            clients[name] = stack.enter_context(Client(f"http://127.0.0.1:{port}", key))
        for client in clients.values():
            until(lambda client=client: _answers(client), 60.0)
        yield Pair(store=store, folder=tmp_path, processes=processes, clients=clients)


def _answers(client: Client) -> bool:
    try:
        client.list_runs(limit=1)
    except ServiceError:
        return False
    return True


def test_a_frozen_leader_is_replaced_and_writes_nothing_when_it_wakes(pair: Pair):
    first = until(pair.leader)
    other = "two" if first == "one" else "one"
    pair.clients[first].create_run(submitted(name="before", seed=4, steps=STEPS))
    until(lambda: pair.store.runs.get("before").state.value == "running")
    os.kill(pair.processes[first].pid, signal.SIGSTOP)
    try:
        pair.clients[other].create_run(submitted(name="after", seed=4, steps=3))
        assert pair.end_of("after") == "succeeded"
        assert pair.leader() == other
        assert pair.end_of("before") == "succeeded"  # read from its folder: who it reports to is frozen
    finally:
        os.kill(pair.processes[first].pid, signal.SIGCONT)
    pair.clients[first].create_run(submitted(name="later", seed=0, steps=3))  # it answers, and does not steer
    assert pair.end_of("later") == "succeeded"
    assert pair.leader() == other
    for name in ("before", "after", "later"):
        seqs = [event.seq for event in pair.store.events.list(name, after=0, limit=1000)]
        assert seqs == list(range(1, len(seqs) + 1))
        assert pair.store.runs.get(name).attempt == 1
    jobs = [place.name.rsplit("-", 1)[0] for place in (pair.folder / "jobs").iterdir()]
    assert sorted(jobs) == ["potstill-after", "potstill-before", "potstill-later"]


def test_a_service_that_is_killed_is_replaced_and_its_runs_are_heard(pair: Pair):
    first = until(pair.leader)
    other = "two" if first == "one" else "one"
    pair.clients[first].create_run(submitted(name="run", seed=4, steps=STEPS))
    until(lambda: pair.store.runs.get("run").state.value == "running")
    pair.processes[first].kill()
    assert pair.end_of("run") == "succeeded"
    assert pair.leader() == other
    assert len(pair.store.events.metrics("run")) == STEPS
