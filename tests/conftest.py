"""How tests share a machine: file by file over the processes of `-n`; whole runs last, as two files would be.

Each process computes on one thread. What is in tests/integration starts processes of its own: those that share one Ray
(integration/conftest.py) follow each other in one process, the others in another, once all other tests are done.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

INTEGRATION = "tests/integration/"
OWN_PROCESSES = ("faults", "interruption", "learner_ranks", "life_over_http", "overload", "placement", "submit")

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch
    os.environ["OMP_NUM_THREADS"] = "1"


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        if not nodeid.startswith(INTEGRATION):
            return super()._split_scope(nodeid)
        own = nodeid.startswith(tuple(f"{INTEGRATION}test_{name}.py" for name in OWN_PROCESSES))
        return f"{INTEGRATION}own" if own else f"{INTEGRATION}shared"


@pytest.hookimpl
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
