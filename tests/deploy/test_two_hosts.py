"""Two machines, as deploy/ray starts them: a run is submitted over HTTP, one machine is lost, and the run ends well.

Each machine is a network namespace with an address of its own, and a cable lies between them. They share a file system,
as the machines of a cluster do, and a token. The run is the quickstart's distillation, of the models that it prepares,
in fewer steps; its teacher has a server of its own on the machine that stays.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from potstill.journal import read_jsonl, steps_in
from tests.quickstart_models import CHECKOUT, OPD, STUDENT, shelf
from tests.services import until

ROOT = Path(__file__).parents[2]
STEPS, PROMPTS = 60, 8
PATIENCE_S = 600.0
CHANGES = [
    "name=travels",
    STUDENT,
    "teacher={kind: registered, name: teacher}",
    "rollout.workers=2",
    "resources.learner={custom: {desk: 1}}",
    "resources.rollout={custom: {room: 1}}",
    f"loop.steps={STEPS}",
    "loop.max_staleness=2",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    space: str
    address: str
    environment: Mapping[str, str]

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.space, *words]

    def ask(self, *words: str) -> str:
        """What a program says that ends well."""
        done = subprocess.run(self.command(*words), env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def potstill(self, *words: str) -> Any:
        return json.loads(self.ask(sys.executable, "-m", "potstill", *words, "--json"))

    def fall(self) -> None:
        """Everything that runs there is gone at once."""
        for pid in ip("netns", "pids", self.space).split():
            os.kill(int(pid), signal.SIGKILL)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    names = [f"potstill-{os.getpid()}-{which}" for which in "ab"]
    with ExitStack() as stack:
        hosts = []
        for number, name in enumerate(names):
            try:
                ip("netns", "add", name)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("this system permits no network namespaces")
            stack.callback(ip, "netns", "delete", name)
            environment = {
                **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "POTSTILL_"))},
                "PYTHON": sys.executable,
                "POTSTILL_RAY_BIND": f"10.231.78.{number + 1}",
                "POTSTILL_RAY_STATE": str(folder / name),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            }
            hosts.append(Host(space=name, address=f"10.231.78.{number + 1}", environment=environment))
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for host in hosts:
            ip("-n", host.space, "addr", "add", f"{host.address}/30", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", host.space, "link", "set", device, "up")
            stack.callback(host.fall)
        yield hosts[0], hosts[1]


@contextmanager
def running(host: Host, words: list[str], *, says: str, log: Path) -> Iterator[None]:
    """A module of Python on that machine, from when it has said that it is up."""
    command, environment = host.command(sys.executable, "-m", *words), {**host.environment, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            until(lambda: says in log.read_text(), PATIENCE_S)
            yield
        finally:
            process.terminate()


@contextmanager
def served(host: Host, folder: Path, models: Path) -> Iterator[Host]:
    """`potstill serve` on that machine; the machine as an administrator of the service sees it."""
    environment = {**host.environment, "RAY_ADDRESS": "http://127.0.0.1:8265", "POTSTILL_TEACHERS": host.address}
    places = {"key-file": folder / "key", "runs": folder / "runs", "secrets": folder / "secrets", "models": models}
    words = ["potstill", "serve", "--port=8000", *(f"--{name}={place}" for name, place in places.items())]
    here = replace(host, environment=environment)
    with running(here, words, says="potstill serves at", log=folder / "serve.log"):
        key = (folder / "key").read_text().strip()
        with_key = {"POTSTILL_URL": "http://127.0.0.1:8000", "POTSTILL_API_KEY": key}
        yield replace(host, environment={**environment, **with_key})


@contextmanager
def taught(client: Host, folder: Path, model: Path) -> Iterator[None]:
    """A teacher's server on the machine of the service, which knows it as `teacher`."""
    key = folder / "secrets" / "teacher"
    key.write_text(secrets.token_hex(16))
    words = ["teacher_server", str(model), "--host", client.address, "--port", "8001", "--key-file", str(key)]
    with running(client, words, says='"ready"', log=folder / "teacher.log"):
        url = f"http://{client.address}:8001"
        client.potstill("teachers", "add", "teacher", "--kind=server", "--at", url, "--secret-ref=file:teacher")
        yield


def writers(run: Path) -> set[str]:
    files = (run / "spans").glob("worker-*.jsonl")
    return {file.stem for file in files if any(span["name"] == "generate" for span in read_jsonl(file))}


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may make a network namespace")
def test_a_submitted_run_outlives_the_loss_of_a_machine(tmp_path: Path):
    models = shelf(CHECKOUT)
    (tmp_path / "secrets").mkdir(mode=0o700)
    (tmp_path / "token").write_text(secrets.token_hex(32))
    up = str(ROOT / "deploy" / "ray" / "up.sh")
    run = tmp_path / "runs" / "travels"
    with two_hosts(tmp_path) as (head, other):
        said = head.ask(up, "head", "--", "--num-cpus=2", '--resources={"desk": 1, "room": 1}')
        assert f"worker {head.address}:6379" in said
        other.ask(up, "worker", f"{head.address}:6379", "--", "--num-cpus=1", '--resources={"room": 1}')
        refused = head.ask("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:8265/api/jobs/")
        assert refused in {"401", "403"}

        with served(head, tmp_path, models) as client, taught(client, tmp_path, models / "teacher"):
            client.potstill("submit", str(OPD), *CHANGES)
            until(lambda: len(writers(run)) == 2, PATIENCE_S)
            other.fall()
            until(lambda: _ended(client.potstill("status", "travels")), PATIENCE_S)
            events = [event["type"] for event in read_jsonl(run / "events.jsonl")]
        head.ask(str(ROOT / "deploy" / "ray" / "down.sh"))
    assert "worker.lost" in events
    ledger = steps_in(run, "ledger.jsonl")
    assert [record["step"] for record in ledger] == list(range(1, STEPS + 1))
    times = Counter(prompt for record in ledger for prompt in record["prompts"])
    assert set(times.values()) == {1}
    assert len(times) == STEPS * PROMPTS
    report = json.loads((run / "report.json").read_text())
    assert report["student_after"] > report["student_before"]


def _ended(run: Mapping[str, Any]) -> bool:
    assert run["status"] not in {"failed", "cancelled"}, run["error"]
    return bool(run["status"] == "succeeded")
