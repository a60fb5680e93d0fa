"""How tests share a machine: file by file over the processes of `-n`; whole runs last, in one of them.

Each process computes on one thread. What is in tests/integration starts processes of its own or holds one to its times:
it has the machine once the others are done.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

INTEGRATION = "tests/integration/"

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch
    os.environ["OMP_NUM_THREADS"] = "1"


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return INTEGRATION if nodeid.startswith(INTEGRATION) else super()._split_scope(nodeid)


@pytest.hookimpl
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
