"""`potstill run`, stopped from outside or with one of its processes killed: it says so, and leaves nothing behind.

The processes of a run are found in its own process tree, and only those are touched.
"""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from potstill.journal import read_jsonl
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
STARTED_S = 120.0
ENDED_S = 60.0
RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # they look for their dead head for a minute, then end
CONFIG = """
name = "long"
method = "opd"
[student]
model = "student"
[teacher]
kind = "server"
model = "student"
[data]
kind = "jsonl"
path = "data.jsonl"
[rollout]
prompts_per_step = 2
max_prompt_tokens = 64
[rollout.sampling]
max_new_tokens = 8
[optim]
lr = 1e-5
[loop]
steps = 1000000
"""
SUPERVISED = ("method=sft", "rollout.source=reference", "teacher={kind: none}")


@dataclass(slots=True, kw_only=True)
class Running:
    """A run that has trained for some steps, with everything that it started by then."""

    process: subprocess.Popen[str]
    folder: Path
    family: list[psutil.Process] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # of the family by process id: command line or title
    ports: set[int] = field(default_factory=set)

    def member(self, name: str) -> psutil.Process:
        """The one process of the run with `name` in its command line or title."""
        (found,) = [process for process in self.family if name in self.names[process.pid]]
        return found

    def end(self) -> tuple[int, dict[str, Any], str]:
        """Exit code, status.json and stderr, once the process has ended by itself."""
        _, said = self.process.communicate(timeout=ENDED_S)
        return self.process.returncode, json.loads((self.folder / "status.json").read_text()), said

    def headline(self) -> str:
        """What the page of the run says first."""
        page = (self.folder / "report.html").read_text()
        return html.unescape(page.partition("<h1>")[2].partition("</h1>")[0])

    def check_nothing_is_left(self, *, but: tuple[str, ...] = ()) -> None:
        ours = [process for process in self.family if self.names[process.pid] not in but]
        _, left = psutil.wait_procs(ours, timeout=10.0)
        assert [self.names[process.pid] for process in left] == []
        assert self.ports.isdisjoint(_listening(psutil.net_connections("tcp4")))


@contextmanager
def running(place: Path, *changes: str) -> Iterator[Running]:
    """`python -m potstill run` in `place`; whatever is left of it at the end is killed, one process at a time.

    With the changes SUPERVISED it starts sooner, and without a teacher of its own.
    """
    save_tiny_model(place / "student", seed=1)
    (place / "data.jsonl").write_text('{"prompt": "12 + 9 = ?", "answer": "21", "solution": "21"}\n')
    (place / "run.toml").write_text(CONFIG)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "potstill", "run", "run.toml", *changes]
    process = subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    run = Running(process=process, folder=place / "runs" / "long")
    try:
        wait_for(lambda: len(list(read_jsonl(run.folder / "metrics.jsonl"))) >= 2, run)
        run.family = _tree(process.pid)
        run.names = {member.pid: " ".join(member.cmdline()).strip() for member in run.family}
        if not changes:
            run.ports = _listening(run.member("teacher_server").net_connections("tcp4"))
            assert run.ports
        yield run
    finally:
        for member in reversed([*run.family, *_tree(process.pid)]):
            if member.is_running():
                member.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], run: Running) -> None:
    deadline = time.monotonic() + STARTED_S
    while not condition():
        assert run.process.poll() is None, run.process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _listening(connections: list[Any]) -> set[int]:
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize(
    ("number", "exit_code", "changes"), [(signal.SIGTERM, 5, ()), (signal.SIGINT, 130, SUPERVISED)]
)
def test_a_run_that_is_told_to_stop_says_cancelled_and_leaves_nothing(
    tmp_path: Path, number: int, exit_code: int, changes: tuple[str, ...]
):
    with running(tmp_path, *changes) as run:
        run.process.send_signal(number)
        code, status, said = run.end()
        assert (code, status["status"]) == (exit_code, "cancelled")
        assert "Traceback" not in said
        assert [event["type"] for event in read_jsonl(run.folder / "events.jsonl")][-1] == "run.cancelled"
        assert re.fullmatch(r"The run was cancelled after step [\d,]+ of 1,000,000\.", run.headline())
        run.check_nothing_is_left()


@pytest.mark.parametrize(
    ("victim", "says", "changes"),
    [
        ("teacher_server", "the teacher server ended with exit code -9", ()),
        ("ray::RolloutWorker", "the rollout worker's process died", ()),
        ("ray::Learner", "the learner's process died", SUPERVISED),
    ],
    ids=["teacher", "worker", "learner"],
)
def test_a_run_that_loses_a_process_fails_with_its_name_and_leaves_nothing(
    tmp_path: Path, victim: str, says: str, changes: tuple[str, ...]
):
    with running(tmp_path, *changes) as run:
        run.member(victim).kill()
        code, status, said = run.end()
        assert (code, status["status"]) == (1, "failed")
        assert (status["error"]["type"], status["error"]["category"]) == ("WorkerLost", "system")
        assert says in status["error"]["message"]
        assert re.fullmatch(rf"The run failed after step [\d,]+ of 1,000,000: .*{says}.*", run.headline())
        assert says in said
        assert said.count("\n") == 1
        run.check_nothing_is_left()


def test_a_run_that_is_killed_itself_takes_its_processes_along(tmp_path: Path):
    with running(tmp_path) as run:
        run.process.kill()
        run.process.wait()
        run.check_nothing_is_left(but=RAYS_AGENTS)
        assert json.loads((run.folder / "status.json").read_text())["status"] == "running"
