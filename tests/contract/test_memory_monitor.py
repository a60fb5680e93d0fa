"""Ray's memory monitor at work: told to keep nearly all memory free, it ends the first process that it may."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
import ray

from orchestrator.outcome import outcome
from potstill.errors import CapacityError, MemoryLost

STRICT = {"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 100}


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(
        "local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20,
        _system_config=STRICT,
    )  # fmt: skip
    yield
    ray.shutdown()


async def test_a_process_that_ray_ends_for_its_memory_is_told_apart_with_the_settings_to_lower(cluster: None):
    class Process:  # in here, so that Ray sends it by value: tests are no package
        async def work(self) -> int:
            await asyncio.sleep(3600)
            return os.getpid()

    working = ray.remote(num_cpus=0)(Process).remote().work.remote()
    with pytest.raises(MemoryLost, match=r"ended by Ray, .*: lower rollout\.workers") as caught:
        await asyncio.wait_for(outcome("rollout worker 3", working), 60)
    assert isinstance(caught.value, CapacityError)
    assert caught.value.category == "capacity"
