"""Two machines, as deploy/ray starts them: a run is submitted over HTTP, one machine is lost, and the run ends well.

Each machine is a network namespace with an address of its own, and a cable lies between them. They share a file system,
as the machines of a cluster do, and a token.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from potstill.journal import read_jsonl, steps_in
from tests.services import until
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
STEPS, PROMPTS = 150, 4
PATIENCE_S = 240.0
CONFIG = f"""
name = "travels"
method = "opd"
[student]
model = "student"
[teacher]
kind = "local"
models = [{{ model = "teacher" }}]
[data]
kind = "reasoning_gym"
dataset = "chain_sum"
[rollout]
workers = 2
min_workers = 1
prompts_per_step = {PROMPTS}
max_prompt_tokens = 128
[rollout.sampling]
max_new_tokens = 12
[resources]
learner = {{ custom = {{ desk = 1 }} }}
rollout = {{ custom = {{ room = 1 }} }}
[optim]
lr = 1e-4
[loop]
steps = {STEPS}
max_staleness = 2
[checkpoint]
every = 50
"""


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
def served(host: Host, folder: Path) -> Iterator[Host]:
    """`potstill serve` on that machine; the machine as an administrator of the service sees it."""
    command = [sys.executable, "-m", "potstill", "serve", "--port", "8000", "--key-file", str(folder / "key")]
    command += ["--runs", str(folder / "runs"), "--models", str(folder / "models")]
    environment = {**host.environment, "RAY_ADDRESS": "http://127.0.0.1:8265", "HF_HUB_OFFLINE": "1"}
    with (
        (folder / "serve.log").open("wb") as log,
        subprocess.Popen(host.command(*command), env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            until(lambda: b"potstill serves at" in (folder / "serve.log").read_bytes())
            with_key = {
                "POTSTILL_URL": "http://127.0.0.1:8000",
                "POTSTILL_API_KEY": (folder / "key").read_text().strip(),
            }
            yield Host(space=host.space, address=host.address, environment={**environment, **with_key})
        finally:
            process.terminate()


def writers(run: Path) -> set[str]:
    files = (run / "spans").glob("worker-*.jsonl")
    return {file.stem for file in files if any(span["name"] == "generate" for span in read_jsonl(file))}


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may make a network namespace")
def test_a_submitted_run_outlives_the_loss_of_a_machine(tmp_path: Path):
    for seed, name in enumerate(("student", "teacher")):
        save_tiny_model(tmp_path / "models" / name, seed=seed)
    (tmp_path / "token").write_text(secrets.token_hex(32))
    (tmp_path / "travels.toml").write_text(CONFIG)
    up = str(ROOT / "deploy" / "ray" / "up.sh")
    run = tmp_path / "runs" / "travels"
    with two_hosts(tmp_path) as (head, other):
        said = head.ask(up, "head", "--", "--num-cpus=2", '--resources={"desk": 1, "room": 1}')
        assert f"worker {head.address}:6379" in said
        other.ask(up, "worker", f"{head.address}:6379", "--", "--num-cpus=1", '--resources={"room": 1}')
        refused = head.ask("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:8265/api/jobs/")
        assert refused in {"401", "403"}

        with served(head, tmp_path) as client:
            client.potstill("submit", str(tmp_path / "travels.toml"))
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


def _ended(run: Mapping[str, Any]) -> bool:
    assert run["status"] not in {"failed", "cancelled"}, run["error"]
    return bool(run["status"] == "succeeded")
