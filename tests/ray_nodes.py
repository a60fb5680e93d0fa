"""A Ray cluster of several nodes in one machine, on loopback: nodes come and go while a run is at work.

A process of its own keeps it, `python -m tests.ray_nodes`, because Ray can be connected once a process and reads its
settings when it is imported. It answers lines of JSON, and takes all nodes with it when its input ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray turns 127.0.0.1 into an address others can reach
SETTINGS = {
    **ON_LOOPBACK,
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
DESK, ROOM = "resources.learner.custom={desk: 1}", "resources.rollout.custom={room: 1}"
"""What a run asks of nodes of these resources: a learner's, and a worker's."""
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}


@dataclass(slots=True, kw_only=True)
class Nodes:
    """`address`: of the head."""

    keeper: subprocess.Popen[str]
    address: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that shall work on this cluster."""
        return {"RAY_ADDRESS": self.address, **ON_LOOPBACK}

    def add(self, **resources: float) -> int:
        """The process id of the new node's raylet."""
        return int(self._ask(resources)["raylet"])

    def _ask(self, resources: dict[str, float]) -> dict[str, Any]:
        assert self.keeper.stdin is not None
        assert self.keeper.stdout is not None
        print(json.dumps(resources), file=self.keeper.stdin, flush=True)
        for line in self.keeper.stdout:
            if line.startswith('{"raylet"'):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError(f"the cluster ended with {self.keeper.wait()}")


@contextmanager
def ray_nodes(**resources: float) -> Iterator[Nodes]:
    """A cluster whose head has these resources."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_nodes"],
        cwd=ROOT,
        env={**os.environ, **SETTINGS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    nodes = Nodes(keeper=keeper)
    try:
        nodes.address = nodes._ask(resources)["address"]
        yield nodes
    finally:
        keeper.communicate(timeout=60.0)


def keep() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for line in sys.stdin:
        head = {} if cluster.head_node else {"include_dashboard": False}
        node = cluster.add_node(resources=json.loads(line), **NODE, **head)
        (raylet,) = node.all_processes["raylet"]
        print(json.dumps({"raylet": raylet.process.pid, "address": cluster.address}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    keep()
