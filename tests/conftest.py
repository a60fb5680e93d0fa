"""How tests share a machine: file by file over the processes of `-n`; whole runs first, one process left to the others.

Each process computes on one thread. What is in tests/integration starts processes of its own, and waits for them more
than it computes: it begins first, the longest before the others, and at most all processes but one are at it. Files
that share one Ray (integration/conftest.py) follow each other in one process. Unit tests, which are short, fill what is
left, and what measures how fast a server answers comes when the others are done.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

INTEGRATION = "tests/integration/"
SHARED = f"{INTEGRATION}shared"
OWN_PROCESSES = ("life_over_http", "faults", "interruption", "learner_ranks", "placement", "submit")
WHOLE_RUNS = (SHARED, *(f"{INTEGRATION}test_{name}.py" for name in OWN_PROCESSES))  # the longest first
TIMED = f"{INTEGRATION}test_overload.py"
OWN_RAY = "a Ray of their own"  # in pytest's process, where the shared one stays once it is there: they come first
OF_OWN_RAY = (
    "tests/unit/test_transports.py",
    "tests/contract/test_outcome.py",
    "tests/contract/test_memory_monitor.py",
)

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own name; its default lets others go first


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        if file in OF_OWN_RAY:
            return OWN_RAY
        return SHARED if file.startswith(INTEGRATION) and file not in (*WHOLE_RUNS, TIMED) else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        """The next whole run, or another file while as many processes as may are at whole runs."""
        runs = [scope for scope in WHOLE_RUNS if scope in self.workqueue]
        others = sorted((scope for scope in self.workqueue if scope not in WHOLE_RUNS), key=_rank)
        chosen = runs if runs and (not others or self._has_room_for_a_run(node)) else others
        self.workqueue.move_to_end(chosen[0], last=False)
        super()._assign_work_unit(node)

    def _has_room_for_a_run(self, node: WorkerController) -> bool:
        busy = [other for other in self.nodes if other is not node and self._is_at_a_run(other)]
        return len(busy) < len(self.nodes) - 1

    def _is_at_a_run(self, node: WorkerController) -> bool:
        work = self.assigned_work[node]
        return any(scope in WHOLE_RUNS and not all(done.values()) for scope, done in work.items())


def _rank(scope: str) -> int:
    return {OWN_RAY: -1, TIMED: 2}.get(scope, int(scope.startswith("tests/unit/")))


@pytest.hookimpl
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
