"""Ray, a learner and rollout workers for all whole runs of this folder that need no processes of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import psutil
import pytest_asyncio

from orchestrator.launch import Site, site
from orchestrator.pulse import RAYS_PARTS
from potstill import recipes
from potstill.config_file import load


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def opened() -> AsyncIterator[Site]:
    """Serves one run after another, as it serves the phases of a recipe; in the end none of its processes is left."""
    async with site(load(recipes.folder() / "opd.toml")) as processes:
        yield processes
        family = [process for process in psutil.Process().children(recursive=True) if is_of_ray(process)]
    assert family
    _, left = psutil.wait_procs(family, timeout=20.0)
    assert [process.name() for process in left] == []


def is_of_ray(process: psutil.Process) -> bool:
    return process.name().startswith("ray::") or process.name() in RAYS_PARTS
