"""What may be loaded where: the shared package and the service's own files need nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "vllm", "fastapi", "transformers", "reasoning_gym", "uvicorn", "sqlalchemy")
BLOCKED_IMPORT = """
import importlib, sys

class Blocked:
    def __init__(self, *names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

*modules, blocked = sys.argv[1:]
sys.meta_path.insert(0, Blocked(*blocked.split(",")))
for module in modules:
    importlib.import_module(module)
"""


def load(*modules: str, without: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Import the modules in a Python in which `without` cannot be imported."""
    command = [sys.executable, "-c", BLOCKED_IMPORT, *modules, ",".join(without)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def modules_of(room: str) -> list[str]:
    names = [path.stem for path in sorted((ROOT / room).glob("*.py"))]
    return [room if name == "__init__" else f"{room}.{name}" for name in names if name != "__main__"]


def test_the_blocker_blocks():
    assert "torch is not installed here" in load("torch", without=("torch",)).stderr


def test_every_module_of_the_shared_package_loads_without_anything_heavy():
    done = load(*modules_of("potstill"), without=HEAVY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (["orchestrator.buffer", "orchestrator.service.runs", "orchestrator.prompts"], HEAVY),
        (["orchestrator.loop", "orchestrator.run", "orchestrator.launch"], ("torch", "vllm", "transformers")),
        (
            ["orchestrator.service.store", "orchestrator.service.app", "orchestrator.service.serve"],
            ("torch", "vllm", "transformers"),
        ),
        (["learner.trainer", "learner.objective", "learner.checkpoint"], ("ray", "vllm", "fastapi")),
        (["rollout_worker.collect", "rollout_worker.engine"], ("ray", "vllm", "fastapi")),
        (["teacher_server.scoring", "teacher_server.limits"], ("ray", "vllm", "fastapi")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_room_loads_without_what_it_does_not_need(modules: list[str], without: tuple[str, ...]):
    done = load(*modules, without=without)
    assert done.returncode == 0, done.stderr
