"""A run in its own process, to be hurt: its processes found by their part in it, ended, frozen and started again.

Only processes of the run's own tree are ever touched, by the ids that were recorded while it lived.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from potstill.journal import read_jsonl, steps_in
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[1]
PARTS = {
    "worker": "ray::RolloutWorker",
    "learner": "ray::Learner",
    "teacher": "teacher_server",
    "raylet": "raylet/raylet",
    "head": "gcs_server",
}
LONG = "loop.steps=1000000"
SUPERVISED = ("method=sft", "rollout.source=reference", "teacher={kind: none}")  # starts sooner, and without a teacher
RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # they look for their dead head for a minute, then end
PROMPTS = 64
LOOK_S = 0.25
CONFIG = """
method = "opd"
[student]
model = "student"
[teacher]
kind = "server"
model = "teacher"
[data]
kind = "jsonl"
path = "data.jsonl"
[rollout]
prompts_per_step = 4
max_prompt_tokens = 64
[rollout.sampling]
max_new_tokens = 8
[optim]
lr = 1e-3
[loop]
silence_s = 20
teacher_wait_s = 60
[checkpoint]
every = 10
"""


def furnish(place: Path) -> None:
    """A student, a teacher and prompts, as small as they can be, and a config."""
    save_tiny_model(place / "student", seed=1)
    save_tiny_model(place / "teacher", seed=2)
    numbers = random.Random(0)
    sums = [(numbers.randrange(50), numbers.randrange(50)) for _ in range(PROMPTS)]
    rows = [{"prompt": f"{a} + {b} = ?", "answer": str(a + b), "solution": str(a + b)} for a, b in sums]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "run.toml").write_text(CONFIG)


@dataclass(slots=True, kw_only=True)
class Disturbed:
    """One run, through all the processes that it takes."""

    place: Path
    name: str
    changes: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    runs: str = "runs"
    process: subprocess.Popen[str] | None = None
    family: dict[int, psutil.Process] = field(default_factory=dict)  # every process that was ever seen
    said: list[str] = field(default_factory=list)
    looked: float = 0.0  # when, on the monotonic clock

    @property
    def folder(self) -> Path:
        return self.place / self.runs / self.name

    @property
    def status(self) -> str:
        return str(json.loads((self.folder / "status.json").read_text())["status"])

    @property
    def steps(self) -> list[dict[str, Any]]:
        return steps_in(self.folder)

    @property
    def events(self) -> list[str]:
        return [event["type"] for event in read_jsonl(self.folder / "events.jsonl")]

    @property
    def writers(self) -> set[str]:
        """Workers that have written a chunk."""
        files = (self.folder / "spans").glob("worker-*.jsonl")
        return {file.stem for file in files if any(span["name"] == "generate" for span in read_jsonl(file))}

    @property
    def headline(self) -> str:
        """What the page of the run says first."""
        page = (self.folder / "report.html").read_text()
        return html.unescape(page.partition("<h1>")[2].partition("</h1>")[0])

    @property
    def cause(self) -> dict[str, str]:
        """What status.json says of a bad end."""
        return dict(json.loads((self.folder / "status.json").read_text()).get("error", {}))

    def start(self, *, resume: bool) -> None:
        command = [sys.executable, "-m", "potstill", "run", "run.toml", f"name={self.name}", f"runs={self.runs}"]
        command += self.changes
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self.environment}
        self.process = subprocess.Popen(
            [*command, *(["--resume"] if resume else [])],
            cwd=self.place,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_ctrl_c,
        )

    def look(self) -> None:
        """Record the processes that there are."""
        assert self.process is not None
        try:
            driver = psutil.Process(self.process.pid)
            found = [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        self.family |= {process.pid: process for process in found}

    def _look_again(self) -> None:
        """Now and then, as a test polls: to read every process of the machine takes the run's own processors."""
        if time.monotonic() > self.looked + LOOK_S:
            self.look()
            self.looked = time.monotonic()

    def part(self, name: str) -> psutil.Process | None:
        """A living process of the run that has this part in it, the one that came last; None while there is none."""
        assert self.process is not None
        self.look()
        if name == "driver":
            return self.family.get(self.process.pid)
        for process in reversed(self.family.values()):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and PARTS[name] in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    def hurt(self, name: str, number: signal.Signals = signal.SIGKILL) -> bool:
        """Send the signal to a part; whether there was one."""
        process = self.part(name)
        if process is None:
            return False
        process.send_signal(number)
        return True

    def wait_for(self, condition: Callable[[], bool], *, limit_s: float = 300.0) -> None:
        assert self.process is not None
        deadline = time.monotonic() + limit_s
        while not condition():
            self._look_again()
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, f"{self.name}: {self.events[-5:]}, {len(self.steps)} steps"
            time.sleep(0.05)

    def trained(self, number: int) -> bool:
        """Whether so many steps are done."""
        return (self.folder / "metrics.jsonl").exists() and len(self.steps) >= number

    def end(self, *, limit_s: float = 400.0) -> int:
        """Its exit code, once it has ended by itself. What it then said is in `said`."""
        assert self.process is not None
        deadline = time.monotonic() + limit_s
        while self.process.poll() is None and time.monotonic() < deadline:
            self._look_again()
            time.sleep(0.05)
        assert self.process.poll() is not None, f"{self.name} has not ended: {self.status}, {self.events[-5:]}"
        _, said = self.process.communicate(timeout=1.0)
        self.said.append(said)
        return self.process.returncode

    def weights(self) -> str:
        """sha256 of the newest checkpoint's model."""
        newest = max((self.folder / "checkpoints").glob("step-??????"))
        return hashlib.sha256((newest / "model" / "model.safetensors").read_bytes()).hexdigest()

    def check_ledger(self, *, steps: int, prompts_per_step: int, max_staleness: int) -> None:
        """Every prompt was trained once, and nothing that was too old."""
        ledger = steps_in(self.folder, "ledger.jsonl")
        assert [record["step"] for record in ledger] == list(range(1, steps + 1))
        times = Counter(prompt for record in ledger for prompt in record["prompts"])
        assert set(times.values()) == {1}
        assert len(times) == steps * prompts_per_step
        assert max(record["staleness_max"] for record in self.steps) <= max_staleness

    def check_nothing_is_left(self, *, but: tuple[str, ...] = RAYS_AGENTS) -> None:
        """No process that the run ever started lives, or will live much longer."""
        deadline = time.monotonic() + 15.0
        while (left := [command for command in self._alive() if not command.startswith(but)]) != []:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def _alive(self) -> Iterator[str]:
        """Commands of the processes that there are still."""
        for process in self.family.values():
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    yield " ".join(process.cmdline())

    def clear(self) -> None:
        """End what a failed test leaves, one recorded process at a time."""
        self.look() if self.process is not None else None
        for process in reversed(self.family.values()):
            if process.is_running():
                process.kill()
        if self.process is not None:
            self.process.wait()


@contextmanager
def disturbed(
    place: Path, name: str, *changes: str, environment: Mapping[str, str] | None = None, runs: str = "runs"
) -> Iterator[Disturbed]:
    """A run that was started in a furnished place."""
    run = Disturbed(place=place, name=name, changes=changes, environment=environment or {}, runs=runs)
    run.start(resume=False)
    try:
        yield run
    finally:
        run.clear()


def _hear_ctrl_c() -> None:
    """What a shell starts in the background ignores SIGINT, and so do its children; a terminal's do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lost_for_good(place: Path, victim: str, kind: str, says: str, *changes: str) -> None:
    """A run that may lose no process loses one: it fails with its name, and leaves nothing."""
    with disturbed(place, f"lost-{victim}", LONG, "loop.restarts=0", *changes) as run:
        run.wait_for(lambda: run.trained(2))
        assert run.hurt(victim)
        assert (run.end(), run.status) == (1, "failed")
        assert (run.cause["type"], run.cause["category"]) == (kind, "system")
        assert says in run.cause["message"]
        assert re.fullmatch(rf"The run failed after step [\d,]+ of 1,000,000: .*{says}.*", run.headline)
        assert says in run.said[-1]
        assert run.said[-1].count("\n") == 1
        run.check_nothing_is_left()
