"""How tests share a machine: file by file over the processes of `-n`, and those that need all of it last, one by one.

Under `-n` each process computes on one thread. Tests of tests/integration run whole runs, and those that are marked
`whole_machine` hold a process to its times: they stay in one process, which has the machine once the others are done.
Files that start a Ray of their own are one group (`xdist_group("ray")`).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTEGRATION = Path(__file__).parent / "integration"

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=needs_all)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("whole machine" if needs_all(item) else str(item.path)))


def needs_all(item: pytest.Item) -> bool:
    return INTEGRATION in item.path.parents or item.get_closest_marker("whole_machine") is not None
