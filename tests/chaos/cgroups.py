"""A control group whose processes the kernel ends for their memory, on either version of control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
NAME = "potstill-chaos"


@contextmanager
def starved(pid: int, limit_bytes: int) -> Iterator[None]:
    """The process as it is, without room for more than `limit_bytes` beyond what it has."""
    old = ROOT / "memory"
    group = (old if old.exists() else ROOT) / NAME
    limit = group / ("memory.limit_in_bytes" if old.exists() else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(limit_bytes))
    except OSError:
        pytest.skip("this system permits no control group with a limit of memory")
    (group / "cgroup.procs").write_text(str(pid))
    try:
        yield
    finally:
        left = (group / "cgroup.procs").read_text().split()
        for process in left:
            (group.parent / "cgroup.procs").write_text(process)
        os.rmdir(group)
