"""Kill -9 of the service's process: what it had acknowledged is there when it comes back, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from orchestrator.service.jobs import Job
from orchestrator.service.principals import Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from potstill.client import Client
from tests.launchers import ProcessLauncher
from tests.plain import PLAIN
from tests.ports import free_port
from tests.service_configs import small_files, submitted
from tests.services import RUN, serving, until


def start_api(folder: Path, port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "tests.launchers", str(folder), str(port), RUN])

    def answers() -> bool:
        try:
            return httpx2.get(f"http://127.0.0.1:{port}/livez", trust_env=False, verify=PLAIN).is_success
        except httpx2.TransportError:
            return False

    until(answers, timeout_s=30.0)
    return process


def test_kill_9_of_the_api_loses_no_acknowledged_run_and_no_event(tmp_path: Path):
    store = Store(Database(f"sqlite:///{tmp_path / 'potstill.db'}"))
    _, key = store.keys.create(owner="operator", label="test", scopes=[Scope.ADMIN])
    small_files(tmp_path)
    store.close()
    port = free_port()
    api = start_api(tmp_path, port)
    followed: list[dict[str, Any]] = []
    try:
        with Client(f"http://127.0.0.1:{port}", key) as client, Client(f"http://127.0.0.1:{port}", key) as follower:
            client.create_run(submitted(name="survivor", seed=4, steps=60))
            reader = threading.Thread(target=lambda: followed.extend(follower.events("survivor")))
            reader.start()
            until(lambda: len(client.list_events("survivor")["data"]) > 10)
            client.create_run(submitted(name="just-stored"))
            os.kill(api.pid, signal.SIGKILL)
            api.wait()
            time.sleep(0.5)
            api = start_api(tmp_path, port)
            assert client.wait("survivor", poll_s=0.05)["status"] == "succeeded"
            assert client.wait("just-stored", poll_s=0.05)["status"] == "succeeded"
            reader.join(20.0)
            pages = client.list_events("survivor", limit=1000)["data"]
    finally:
        api.kill()
        api.wait()
    assert [event["data"]["step"] for event in pages if event["type"] == "step.finished"] == list(range(1, 61))
    assert [event["seq"] for event in pages] == list(range(1, len(pages) + 1))
    assert followed == pages


def test_a_run_that_ended_while_the_api_was_dead_is_read_from_its_folder(tmp_path: Path):
    store = Store(Database(f"sqlite:///{tmp_path / 'potstill.db'}"))
    _, key = store.keys.create(owner="operator", label="test", scopes=[Scope.ADMIN])
    small_files(tmp_path)
    store.close()
    port = free_port()
    api = start_api(tmp_path, port)
    try:
        with Client(f"http://127.0.0.1:{port}", key) as client:
            client.create_run(submitted(name="orphan", seed=2))
            until(lambda: client.get_run("orphan")["status"] == "running")
            os.kill(api.pid, signal.SIGKILL)
            api.wait()
            (pid,) = (tmp_path / "jobs").glob("*/pid")
            os.kill(int(pid.read_text()), signal.SIGTERM)
            until((pid.parent / "exit").exists, timeout_s=30.0)
            api = start_api(tmp_path, port)
            run = client.wait("orphan", poll_s=0.05)
            types = [event["type"] for event in client.events("orphan")]
    finally:
        api.kill()
        api.wait()
    assert run["status"] == "cancelled"
    assert types.count("run.cleaned") == 1


class Stumbling(ProcessLauncher):
    """Makes a mistake that nobody foresaw, once."""

    stumbled = False

    def look(self) -> Mapping[str, Job]:
        if not self.stumbled:
            self.stumbled = True
            raise ZeroDivisionError("nobody foresaw this")
        return super().look()


def test_a_mistake_in_one_look_at_the_runs_does_not_end_the_looking(tmp_path: Path):
    with serving(tmp_path, lambda url: Stumbling(tmp_path / "jobs", RUN, url)) as service:
        service.http.post("/v1/runs", json=submitted(name="patient"))
        until(lambda: service.http.get("/v1/runs/patient").json()["status"] == "succeeded")
        assert service.http.get("/readyz").status_code == 200
