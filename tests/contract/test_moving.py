"""A service's database copied: to PostgreSQL in the middle of a run, back, and as a backup while it is written to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from orchestrator.service.principals import Scope
from orchestrator.service.runs import State
from orchestrator.service.store import Store
from orchestrator.service.store.copying import copy
from orchestrator.service.store.database import Database
from orchestrator.service.store.migrations import upgrade
from orchestrator.service.store.schema import META
from potstill.client import Client
from potstill.errors import ConfigError
from tests.databases import server, url
from tests.launchers import AwayLauncher
from tests.left_behind import begin, report
from tests.plain import PLAIN
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service_configs import small_files, submitted
from tests.services import RUN, serving, until

__all__ = ["server", "url"]

STEPS = 60  # of 50 ms each


def content(database: str) -> dict[str, list[dict[str, Any]]]:
    engine = sa.create_engine(database)
    with engine.connect() as db:
        found = {
            table.name: [dict(row) for row in db.execute(sa.select(table).order_by(*table.primary_key)).mappings()]
            for table in META.sorted_tables
        }
    engine.dispose()
    return found


def first_key(database: str) -> str:
    store = Store(Database(database))
    _, key = store.keys.create(owner="operator", label="", scopes=[Scope.ADMIN])
    store.close()
    return key


def steps_of(database: str, run: str) -> list[float | None]:
    store = Store(Database(database))
    steps = [row["step"] for row in store.events.metrics(run)]
    store.close()
    return steps


@contextmanager
def service(folder: Path, port: int, database: str) -> Iterator[None]:
    """In a process of its own, which is ended as a machine's fall would."""
    with subprocess.Popen([sys.executable, "-m", "tests.launchers", str(folder), str(port), RUN, database]) as process:
        try:
            until(lambda: _answers(port))
            yield
        finally:
            os.kill(process.pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.get(f"http://127.0.0.1:{port}/livez", trust_env=False, verify=PLAIN).is_success
    return False


def test_a_run_goes_on_when_its_service_moves_to_postgres(server: Postgres, tmp_path: Path):
    old, new = f"sqlite:///{tmp_path / 'potstill.db'}", server.database("moved")
    key = first_key(old)
    small_files(tmp_path)
    port = free_port()
    with Client(f"http://127.0.0.1:{port}", key) as client:
        with service(tmp_path, port, old):
            client.create_run(submitted(name="moves", seed=4, steps=STEPS), idempotency_key="once")
            until(lambda: client.get_run("moves")["progress"]["step"] > 5)
        copy(old, new)
        with service(tmp_path, port, new):
            assert (
                client.create_run(submitted(name="moves", seed=4, steps=STEPS), idempotency_key="once")["id"] == "moves"
            )
            assert client.wait("moves", poll_s=0.05)["status"] == "succeeded"
            events = client.list_events("moves", limit=100)["data"]
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
            client.create_run(submitted(name="later"))
            assert [run["id"] for run in client.list_runs()["data"]] == ["later", "moves"]
    assert steps_of(new, "moves") == list(range(1, STEPS + 1))


def test_a_backup_is_restored_under_a_run_that_has_gone_on(tmp_path: Path):
    live, backup = (f"sqlite:///{tmp_path / name}.db" for name in ("live", "backup"))
    key = first_key(live)
    small_files(tmp_path)
    port = free_port()
    with Client(f"http://127.0.0.1:{port}", key) as client:

        def reached(step: int) -> bool:
            return bool(client.get_run("goes-on")["progress"]["step"] > step)

        with service(tmp_path, port, live):
            client.create_run(submitted(name="goes-on", seed=4, steps=STEPS))
            until(lambda: reached(5))
            copy(live, backup)
            client.create_run(submitted(name="since-then", seed=4, steps=STEPS))
            until(lambda: reached(20))
        with service(tmp_path, port, backup):
            assert client.wait("goes-on", poll_s=0.05)["status"] == "succeeded"
            assert [run["id"] for run in client.list_runs()["data"]] == ["goes-on"]
    assert steps_of(backup, "goes-on") == list(range(1, STEPS + 1))


def test_what_was_copied_there_and_back_is_the_same(url: str, server: Postgres, tmp_path: Path):
    """From each database into both."""
    with serving(tmp_path / "service", lambda _url: AwayLauncher(), database=url) as running:
        begin(running, "one", state=State.RUNNING)
        report(running, "one", [{"step": step, "loss": None if step == 7 else 0.5 / step} for step in range(1, 900)])
        running.http.put("/v1/runs/one/checkpoints/step-000001/ttl", json={"seconds": 60})
        running.http.post("/v1/files", files={"file": ("é.jsonl", b'{"prompt": "1"}\n')}, data={"purpose": "prompts"})
        running.key_for("ann", Scope.RUNS_READ)
        begin(running, "two", state=State.FAILED)
        running.http.delete("/v1/runs/two").raise_for_status()  # a gap in the numbers
        begin(running, "three")
    there, back = server.database(f"there{url[:6]}"), f"sqlite:///{tmp_path / 'back.db'}"
    rows = copy(url, there)
    assert rows["events"] > 899
    assert copy(there, back) == rows
    assert content(url) == content(there) == content(back)
    for moved in (there, back):
        first_key(moved)  # under a number that nobody has


def test_a_copy_is_one_moment_while_others_write(url: str, tmp_path: Path):
    with serving(tmp_path / "service", lambda _url: AwayLauncher(), database=url) as running:
        begin(running, "busy", state=State.RUNNING)
        ending = threading.Event()

        def write() -> None:
            number = 0
            while not ending.is_set():
                number += 1
                running.store.runs.remark("busy", "tick", f"{number}", number=number)
                running.store.runs.spent("busy", teacher_tokens=number, teacher_usd=0.0)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            copies = [f"sqlite:///{tmp_path / name}.db" for name in "abc"]
            for to in copies:
                copy(url, to)
        finally:
            ending.set()
            writer.join()
    for to in copies:
        found = content(to)
        ticks = [row["data"]["number"] for row in found["events"] if row["type"] == "tick"]
        (run,) = found["runs"]
        assert ticks == list(range(1, len(ticks) + 1))
        assert run["teacher_tokens"] in {len(ticks), len(ticks) - 1}  # of the same moment


def test_a_destination_that_holds_anything_is_refused_and_left_alone(tmp_path: Path):
    urls = [f"sqlite:///{tmp_path / name}.db" for name in ("old", "new")]
    for database in urls:
        first_key(database)
    before = content(urls[1])
    with pytest.raises(ConfigError, match="holds keys already"):
        copy(*urls)
    assert content(urls[1]) == before


def test_a_source_of_another_version_or_nowhere_is_refused_and_nothing_is_made(tmp_path: Path):
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    with pytest.raises(ConfigError, match="cannot be opened"):
        copy(f"sqlite:///{old}", f"sqlite:///{new}")
    engine = sa.create_engine(f"sqlite:///{old}")
    upgrade(engine, "0001")
    engine.dispose()
    with pytest.raises(ConfigError, match="serve it once with this one"):
        copy(f"sqlite:///{old}", f"sqlite:///{new}")
    assert not new.exists()
