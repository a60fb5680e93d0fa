"""A Ray head of our own, for a service on one machine: every port on loopback, and none without a token.

The head is a process of its own session, so that runs go on while the service restarts. Its token is 256 random bits
that live only in its environment: a restarted service of the same user reads it from there, and nothing secret is
written to disk. Refuses to touch a process that is not the one it recorded.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil

from orchestrator.service.jobs import Cluster
from potstill.errors import ConfigError, ServiceError
from potstill.journal import write_json

START_S = 120.0  # ten seconds on a quiet machine
STOP_S = 45.0  # Ray drains its node for up to 30 s


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalHead:
    """A running head, as recorded in its file. A pid can come to name another process; `born` tells the two apart."""

    pid: int
    born: float  # when the system says that the process began
    address: str
    temp: str
    token: str = field(repr=False)  # not in the record

    @property
    def cluster(self) -> Cluster:
        return Cluster(address=self.address, token=self.token)

    @property
    def alive(self) -> bool:
        return _lives(self.pid, self.born)

    def stop(self, record: Path) -> None:
        """End the head, and with it every job on it: SIGTERM, and SIGKILL when that is not enough."""
        for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 5.0)):
            if self.alive:
                os.kill(self.pid, number)
                _await_end(self, patience_s)
        shutil.rmtree(self.temp, ignore_errors=True)
        record.unlink(missing_ok=True)


def start_or_adopt(record: Path) -> LocalHead:
    """The head that `record` names, when it lives; else a new one, recorded there. Takes about ten seconds.

    Raises ServiceError when the head does not come up.
    """
    if record.exists():
        earlier = json.loads(record.read_bytes())
        if _lives(earlier["pid"], earlier["born"]):
            return LocalHead(**earlier, token=_token_of(earlier["pid"]))
        shutil.rmtree(earlier["temp"], ignore_errors=True)
    head = _start()
    write_json(record, {"pid": head.pid, "born": head.born, "address": head.address, "temp": head.temp})
    _await_answer(head, record)
    return head


def _start() -> LocalHead:
    temp = tempfile.mkdtemp(prefix="potstill-ray-")  # short: Ray puts Unix sockets below it
    dashboard, client, agent, metrics = _free_ports(4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--no-monitor", "--node-ip-address=127.0.0.1", "--port=0", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--temp-dir={temp}"]
    environment = {name: value for name, value in os.environ.items() if name != "POTSTILL_API_KEY"}
    token = secrets.token_hex(32)
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray turns 127.0.0.1 into an address others can reach
    }
    with (Path(temp) / "head.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - every argument is ours
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    born = psutil.Process(process.pid).create_time()
    return LocalHead(pid=process.pid, born=born, address=f"http://127.0.0.1:{dashboard}", temp=temp, token=token)


def _await_answer(head: LocalHead, record: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and head.alive:
        if _has_node(head):
            return
        time.sleep(0.3)
    kept = shutil.copy(f"{head.temp}/head.log", record.with_suffix(".log"))
    head.stop(record)
    raise ServiceError(f"the local Ray head did not start: see {kept}", 503, "cluster_unavailable")


def _has_node(head: LocalHead) -> bool:
    """Whether jobs can run. The dashboard answers seconds before that; a head stopped in between hangs in its drain."""
    headers = {"Authorization": f"Bearer {head.cluster.token}"}
    try:
        answer = httpx2.get(f"{head.address}/nodes?view=summary", headers=headers, trust_env=False)
        return answer.is_success and bool(answer.json()["data"]["summary"])
    except httpx2.TransportError:
        return False


def _await_end(head: LocalHead, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while head.alive and time.monotonic() < deadline:
        time.sleep(0.05)


def _lives(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return bool(process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _token_of(pid: int) -> str:
    try:
        return str(psutil.Process(pid).environ()["RAY_AUTH_TOKEN"])
    except (psutil.AccessDenied, KeyError):
        raise ConfigError(f"the Ray head {pid} of this folder belongs to another user: end it, or set --runs") from None


def _free_ports(count: int) -> list[int]:
    """Ports that are free now. They are all held until the last is known, so that no two are the same."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(held.getsockname()[1]) for held in sockets]
    for held in sockets:
        held.close()
    return ports
