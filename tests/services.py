"""The real service on a free port of loopback, for as long as a `with`; `launcher_for` gets its URL."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from starlette.types import ASGIApp

from orchestrator.service.app import create_app
from orchestrator.service.jobs import Launcher
from orchestrator.service.store import Store
from potstill.client import Client
from tests.launchers import POLL_S

RUN = '"$PYTHON" -m tests.tiny_run "$CONFIG" --report-to "$REPORT_TO" $RESUME'


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running service, and a key to it."""

    url: str
    key: str
    folder: Path
    store: Store
    http: httpx2.Client

    def client(self) -> Client:
        return Client(self.url, self.key)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
    return value


@contextmanager
def serving(
    folder: Path, launcher_for: Callable[[str], Launcher], before: Callable[[ASGIApp], ASGIApp] = lambda app: app
) -> Iterator[Service]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    store = Store(f"sqlite:///{folder / 'potstill.db'}")
    key = store.create_key("test")
    app = create_app(store, launcher_for(url), runs=folder / "runs", poll_s=POLL_S)
    app.add_api_route("/boom", lambda: {}["/a/secret/path"])
    config = uvicorn.Config(before(app), host="127.0.0.1", port=port, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(base_url=url, headers=headers, trust_env=False, timeout=30.0) as http:
        yield Service(url=url, key=key, folder=folder, store=store, http=http)
    server.should_exit = True
    thread.join()
    store.close()
