"""A service that is killed with SIGKILL again and again while runs report, readers follow and clients create.

What must be true afterwards: every run that was acknowledged exists, once, and answers for its Idempotency-Key; no run
exists twice for one key; the runs that were running still are, in the processes that they had; every event has the next
number, and every reader saw each of them once and in order.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from orchestrator.service.principals import Limits, Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from tests.plain import PLAIN
from tests.ports import free_port
from tests.service_configs import small_files, submitted
from tests.services import RUN, until

WORKERS = 3  # runs that report throughout
ENDLESS = 1_000_000  # steps
LONGEST_LIFE_S = 2.0  # of a service
SCOPES = [Scope.RUNS_READ, Scope.RUNS_WRITE]


@dataclass
class Battered:
    """A service with a port of its own, whichever process it is at the moment."""

    folder: Path
    database: str
    port: int
    process: subprocess.Popen[bytes] | None = None
    ending: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.launchers", str(self.folder), str(self.port), RUN, self.database]
        self.process = subprocess.Popen(command)

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/livez", trust_env=False, verify=PLAIN).is_success
        except httpx2.TransportError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def battered(folder: Path, database: str) -> Iterator[tuple[Battered, str, str]]:
    """The service, a key whose runs all start, and one whose runs stay in the queue."""
    small_files(folder)
    store = Store(Database(database))
    _, working = store.keys.create(owner="working", label="", scopes=SCOPES)
    _, waiting = store.keys.create(owner="waiting", label="", scopes=SCOPES, limits=Limits(running=0))
    store.close()
    service = Battered(folder=folder, database=database, port=free_port())
    service.start()
    try:
        until(service.answers, timeout_s=60.0)
        yield service, working, waiting
    finally:
        service.ending.set()
        service.kill()
        for pid in _pids(folder).values():
            if _lives(pid):
                os.kill(pid, signal.SIGKILL)


class Creator(threading.Thread):
    """Creates runs as fast as they are taken; tries each again under its key until it is acknowledged."""

    def __init__(self, service: Battered, key: str) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._headers = {"Authorization": f"Bearer {key}"}
        self.acknowledged: list[str] = []
        self.lost_answers = 0
        self.problem: str | None = None

    def run(self) -> None:
        with httpx2.Client(base_url=self._service.url, headers=self._headers, trust_env=False, verify=PLAIN) as http:
            for number in itertools.count():
                if self._service.ending.is_set() or not self._create(http, f"made-{number}"):
                    return

    def _create(self, http: httpx2.Client, name: str) -> bool:
        while not self._service.ending.is_set():
            try:
                answer = http.post("/v1/runs", json=submitted(name=name), headers={"Idempotency-Key": name})
            except httpx2.TransportError:
                self.lost_answers += 1
                time.sleep(0.05)
                continue
            if answer.status_code not in {200, 201}:
                self.problem = f"{name}: HTTP {answer.status_code}: {answer.text}"
                return False
            self.acknowledged.append(name)
            return True
        return False


class Reader(threading.Thread):
    """Follows a run to its end, and comes again behind the last event whenever its stream breaks."""

    def __init__(self, service: Battered, key: str, run: str) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._headers = {"Authorization": f"Bearer {key}"}
        self._run = run
        self.seen: list[int] = []
        self.ended = False

    def run(self) -> None:
        with httpx2.Client(base_url=self._service.url, headers=self._headers, trust_env=False, verify=PLAIN) as http:
            while not self.ended and not self._service.ending.is_set():
                try:
                    self._follow(http)
                except httpx2.TransportError:
                    time.sleep(0.05)

    def _follow(self, http: httpx2.Client) -> None:
        behind = {"Last-Event-ID": str(self.seen[-1] if self.seen else 0)}
        with http.sse(f"/v1/runs/{self._run}/events", headers=behind, timeout=httpx2.Timeout(5.0, read=60.0)) as source:
            for message in source:
                if message.event == "run.event":
                    self.seen.append(json.loads(message.data)["seq"])
                self.ended = self.ended or message.event == "end"


def survive(folder: Path, database: str, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill the service so often, at moments that `seed` decides, and check everything. Returns what was counted."""
    chance = random.Random(seed)
    with battered(folder, database) as (service, working, waiting):
        workers = [f"worker-{number}" for number in range(WORKERS)]
        with httpx2.Client(
            base_url=service.url, headers={"Authorization": f"Bearer {working}"}, trust_env=False, verify=PLAIN
        ) as http:
            for name in workers:
                assert http.post("/v1/runs", json=submitted(name=name, seed=4, steps=ENDLESS)).status_code == 201
            until(lambda: all(_run(http, name)["progress"]["step"] > 0 for name in workers), timeout_s=60.0)
            pids = _pids(folder)
            readers = [Reader(service, working, name) for name in workers]
            creator = Creator(service, waiting)
            for thread in (*readers, creator):
                thread.start()
            for number in range(kills):
                time.sleep(chance.uniform(0.0, LONGEST_LIFE_S))
                service.kill()
                service.start()
                if number % 5:  # every fifth is killed while it begins
                    until(service.answers, timeout_s=60.0)
            until(service.answers, timeout_s=60.0)
            _check_still_running(http, workers, pids, folder)
            taken = len(creator.acknowledged)
            until(lambda: len(creator.acknowledged) > taken, timeout_s=60.0)
            for name in workers:
                assert http.post(f"/v1/runs/{name}/cancel", json={"mode": "immediate"}).status_code == 202
            until(lambda: all(reader.ended for reader in readers), timeout_s=120.0)
            assert creator.problem is None
            counted = {
                name: _check_events(http, name, reader.seen) for name, reader in zip(workers, readers, strict=True)
            }
        service.ending.set()
        creator.join(30.0)
        _check_created(service, waiting, creator.acknowledged)
        return {"kills": kills, "created": len(creator.acknowledged), "lost_answers": creator.lost_answers, **counted}


def _check_still_running(http: httpx2.Client, workers: list[str], pids: dict[str, int], folder: Path) -> None:
    assert _pids(folder) == pids, "a run was launched twice"
    before = {name: _run(http, name) for name in workers}
    assert {run["status"] for run in before.values()} == {"running"}
    assert {run["attempt"] for run in before.values()} == {1}
    until(lambda: all(_run(http, name)["progress"]["step"] > before[name]["progress"]["step"] for name in workers))


def _check_events(http: httpx2.Client, run: str, seen: list[int]) -> int:
    """Whether a run's events have no gap, the run's own steps none either, and the reader saw all of them once."""
    events: list[dict[str, Any]] = []
    more = True
    while more:
        page = http.get(f"/v1/runs/{run}/events", params={"after": len(events), "limit": 1000}).json()
        events, more = events + page["data"], page["has_more"]
    numbers = [event["seq"] for event in events]
    assert numbers == list(range(1, len(events) + 1))
    steps = [event["data"]["step"] for event in events if event["type"] == "step.finished"]
    assert steps == list(range(1, len(steps) + 1))
    assert seen == numbers
    return len(events)


def _check_created(service: Battered, key: str, acknowledged: list[str]) -> None:
    with httpx2.Client(
        base_url=service.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, verify=PLAIN
    ) as http:
        names: list[str] = []
        after: dict[str, str] = {}
        more = True
        while more:
            page = http.get("/v1/runs", params={"limit": 100, **after}).json()
            names += [run["id"] for run in page["data"]]
            after, more = {"after": page["last_id"]}, page["has_more"]
        assert len(names) == len(set(names))
        assert set(acknowledged) <= set(names)
        assert len(names) <= len(acknowledged) + 1, "more runs than requests: one more may have lost its answer"
        again = http.post("/v1/runs", json=submitted(name="made-0"), headers={"Idempotency-Key": "made-0"})
        assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
        assert {_run(http, name)["status"] for name in acknowledged[-20:]} == {"queued"}


def _run(http: httpx2.Client, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = http.get(f"/v1/runs/{name}").json()
    return answer


def _pids(folder: Path) -> dict[str, int]:
    """The processes of runs, by job."""
    return {place.parent.name: int(place.read_text()) for place in (folder / "jobs").glob("*/pid")}


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
