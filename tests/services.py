"""The real service on a free port of loopback, for as long as a `with`; `launcher_for` gets its URL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from starlette.types import ASGIApp

from orchestrator.service.app import create_app
from orchestrator.service.jobs import Launcher
from orchestrator.service.keys import Signer
from orchestrator.service.measures import Measures
from orchestrator.service.principals import Limits, Scope
from orchestrator.service.serve import ServiceOptions, compose
from orchestrator.service.server import Server
from orchestrator.service.state import ServiceState
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from potstill.client import Client
from tests.launchers import POLL_S
from tests.plain import PLAIN
from tests.ports import free_port
from tests.service_configs import small_files

RUN = '"$PYTHON" -m tests.tiny_run "$CONFIG" --report-to "$REPORT_TO" $RESUME'


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running service, and an administrator's key to it."""

    url: str
    key: str
    folder: Path
    store: Store
    state: ServiceState
    measures: Measures
    http: httpx2.Client
    end: Callable[[], None]  # returns once it is gone

    def client(self) -> Client:
        return Client(self.url, self.key)

    def key_for(self, owner: str, *scopes: Scope, **limits: Any) -> str:
        """Another key."""
        _, key = self.store.keys.create(owner=owner, label="", scopes=scopes, limits=Limits(**limits))
        return key

    def asking(self, key: str) -> httpx2.Client:
        """A client with that key."""
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, trust_env=False, verify=PLAIN, timeout=30.0)


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
    return value


def options(folder: Path, database: str | None = None, **changes: Any) -> ServiceOptions:
    """Of a service whose models, data and secrets lie in `folder`."""
    named: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "runs": folder / "runs",
        "database": database or f"sqlite:///{folder / 'potstill.db'}",
        "key_file": None,
        "new_key": False,
        "allowed_hosts": (),
        "report_url": None,
        "models": (folder / "models",),
        "data": (folder / "data",),
        "secrets": folder / "secrets",
        "admin_host": "127.0.0.1",
        "admin_port": None,
        "slots": None,
    }
    for name in ("runs", "models", "data", "secrets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return ServiceOptions(**named | changes)


@contextmanager
def serving(
    folder: Path,
    launcher_for: Callable[[str], Launcher],
    before: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    *,
    database: str | None = None,
    **changes: Any,
) -> Iterator[Service]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    asked = options(folder, database, **changes)
    small_files(folder)
    store = Store(Database(asked.database))
    _, key = store.keys.create(owner="operator", label="test", scopes=[Scope.ADMIN])
    state = compose(store, launcher_for(url), Signer(b"test"), asked, holder="test", poll_s=POLL_S)
    measures = Measures(store, lambda: state.supervisor.healthy)
    app = create_app(state, measures=measures)
    app.add_api_route("/boom", lambda: {}["/a/secret/path"], include_in_schema=False)
    server = Server(
        before(app), state.following, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)

    def end() -> None:
        server.should_exit = True
        thread.join()

    headers = {"Authorization": f"Bearer {key}"}
    try:
        with httpx2.Client(base_url=url, headers=headers, trust_env=False, verify=PLAIN, timeout=30.0) as http:
            yield Service(
                url=url, key=key, folder=folder, store=store, state=state, measures=measures, http=http, end=end
            )
    finally:
        end()
        store.close()
