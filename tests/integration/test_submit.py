"""Runs as real Ray jobs, through the service and its client, on a local head of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from sys import executable

import httpx2
import psutil
import pytest

from orchestrator.service.head import LocalHead, start_or_adopt
from orchestrator.service.jobs import Cluster, RayLauncher
from potstill.client import Client
from potstill.errors import ServiceError
from tests.plain import PLAIN
from tests.service_configs import submitted
from tests.services import serving


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("head") / "ray-head.json"


@pytest.fixture(scope="module")
def head(record: Path) -> Iterator[LocalHead]:
    started = start_or_adopt(record)
    family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
    yield started
    started.stop(record)
    _, left = psutil.wait_procs(family, timeout=10.0)
    assert not left
    assert not record.exists()
    assert not Path(started.temp).exists()


@pytest.fixture(scope="module")
def client(head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("service")

    def launcher(url: str) -> RayLauncher:
        return RayLauncher(head.cluster, command=(executable, "-m", "tests.tiny_run"), report_url=url, service="tiny")

    with serving(folder, launcher) as service, service.client() as connected:
        yield connected


def test_jobs_succeed_fail_die_and_are_cancelled_as_runs_do(client: Client):
    for name, seed in (("stopped", 2), ("good", 0), ("bad", 1), ("dead", 3), ("saved", 5)):
        client.create_run(submitted(name=name, seed=seed))
    deadline = time.monotonic() + 60.0
    while client.get_run("stopped")["status"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert client.cancel_run("stopped")["status"] == "cancelling"
    ended = {name: client.wait(name, poll_s=0.2) for name in ("good", "bad", "dead", "saved", "stopped")}

    assert {name: run["status"] for name, run in ended.items()} == {
        "good": "succeeded",
        "bad": "failed",
        "dead": "failed",
        "saved": "succeeded",
        "stopped": "cancelled",
    }
    assert ended["bad"]["error"]["type"] == "NonFinite"
    assert ended["dead"]["error"]["message"].endswith("(exit code 9)")
    assert "the last words of this process" in ended["dead"]["error"]["log_tail"]
    assert "run.cleaned" in [event["type"] for event in client.events("stopped")]
    steps = [event["data"]["step"] for event in client.events("good") if event["type"] == "step.finished"]
    assert steps == [1, 2, 3]


def listening_addresses(process: psutil.Process) -> set[str]:
    try:
        connections = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:  # a job's last process, on its way out
        return set()
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


def test_the_head_listens_on_loopback_only(head: LocalHead):
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    addresses = set().union(*(listening_addresses(process) for process in family))
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_the_head_refuses_strangers(head: LocalHead):
    for token in (None, "wrong"):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = httpx2.get(f"{head.address}/api/jobs/", headers=headers, trust_env=False, verify=PLAIN)
        assert answer.status_code in {401, 403}
    with pytest.raises(ServiceError, match="token"):
        RayLauncher(Cluster(address=head.address, token="wrong"), command=(), report_url="", service="").look()


def test_a_restarted_service_adopts_the_head_and_its_token_is_in_no_file(head: LocalHead, record: Path):
    adopted = start_or_adopt(record)
    assert adopted == head
    assert adopted.cluster == head.cluster
    assert head.cluster.token is not None
    assert head.cluster.token not in record.read_text()
    told = [path for path in Path(head.temp).rglob("*.log") if head.cluster.token in path.read_text(errors="replace")]
    assert told == []


@pytest.mark.long
def test_a_service_that_is_asked_to_stop_takes_its_idle_head_with_it_and_exits_0(tmp_path: Path):
    command = [executable, "-m", "potstill", "serve", "--runs", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while "potstill serves at" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        recorded = json.loads((tmp_path / ".ray-head.json").read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not (tmp_path / ".ray-head.json").exists()
    gone = not psutil.pid_exists(recorded["pid"])
    assert gone or psutil.Process(recorded["pid"]).status() == psutil.STATUS_ZOMBIE  # until init collects it
