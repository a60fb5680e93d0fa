"""A Ray cluster, ours or one that was there: connected to, asked for room, and given actors.

The learner's ranks lie in one placement group, all of them or none. Each worker's room is a group of its own, so that
one knows when there is some. Groups outlive their actors: Ray finds new room for a bundle whose node is gone.
placement.py says what is asked for.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.placement import Node, Placement, same_host, shortage
from potstill.config_resources import Needs
from potstill.errors import CapacityError, ConfigError

NO_SPARES = {"prestart_worker_first_driver": False}  # of a local Ray: one idle process a core, which no actor takes
OBJECT_STORE_BYTES = 512 << 20  # of a local Ray: weights in flight and scored rollouts of a laptop's run
POLL_S = 0.5

Berth = dict[str, Any]
"""Where an actor lies and what it holds there, as Ray's options."""


def connect(environment: Mapping[str, str]) -> None:
    """To the cluster of RAY_ADDRESS, or to a new one on this machine that ends with us. `environment`: of actors."""
    import ray

    # "local" by name: without an address Ray would join whatever cluster was last started on this machine
    own = {
        "address": "local",
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_system_config": NO_SPARES,
    }
    local = own if is_own() else {}
    ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": dict(environment)}, **local)


def is_own() -> bool:
    """Whether the Ray that we are connected to was started by us, for this machine alone."""
    return not os.environ.get("RAY_ADDRESS")


def on_one_host() -> bool:
    """Whether every process of a run shares this host's memory, now and later."""
    return same_host([node.address for node in nodes()], own=is_own())


def this_host() -> str:
    """The address of our own node, as the cluster knows it."""
    import ray

    ours = ray.get_runtime_context().get_node_id()
    return str(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == ours))


def nodes() -> list[Node]:
    """Those that live."""
    import ray

    return [Node(address=one["NodeManagerAddress"], has=one["Resources"]) for one in ray.nodes() if one["Alive"]]


def lacking(what: str, bundles: Sequence[Needs], *, strategy: str, waited_s: float) -> CapacityError:
    """With what the cluster has now."""
    return CapacityError(shortage(what, bundles, nodes(), strategy=strategy, waited_s=waited_s))


def actor(cls: type, berth: Berth, environment: Mapping[str, str]) -> Any:
    """A new one, or one to come: it waits for its room."""
    import ray

    made = ray.remote(num_cpus=0, concurrency_groups={"aside": 2})(cls)  # a sign of life waits for no work
    return made.options(runtime_env={"env_vars": dict(environment)}, **berth).remote()


def enter(process: object, folder: str) -> None:
    """Called in a new actor: go where the run was started, so that its paths mean the same. Raises ConfigError where
    the actor's node does not have that folder."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"node {socket.gethostname()} cannot enter {folder} ({error.strerror}): start the run in a folder on a "
            "file system that all nodes share"
        ) from None


def holding(needs: Needs) -> Berth:
    """Anywhere that there is room. Without GPUs nothing is said of them, and Ray hides none."""
    others = {name: amount for name, amount in needs.items() if name not in {"CPU", "GPU"}}
    gpus = {"num_gpus": needs["GPU"]} if "GPU" in needs else {}
    return {"num_cpus": needs.get("CPU", 0.0), "resources": others, **gpus}


class Gang:
    """Room for one learner's ranks, and for the workers that lie beside them or by themselves."""

    def __init__(self) -> None:
        self._placement: Placement | None = None
        self._group: Any = None
        self._rooms: dict[int, Any] = {}  # groups of one bundle, by worker

    def suits(self, placement: Placement) -> bool:
        """Whether those who are in it may stay."""
        return self._placement is None or self._placement == placement

    async def gather(self, placement: Placement, wait_s: float) -> None:
        """Have room for every rank. Raises CapacityError when there is none for so long."""
        from ray.util.placement_group import placement_group

        self._placement = placement
        if not placement.bundles:
            return
        if self._group is None:
            self._group = placement_group(list(placement.bundles), strategy=placement.strategy)
        try:
            async with asyncio.timeout(wait_s):
                while not await asyncio.to_thread(self._group.wait, POLL_S):
                    pass
        except TimeoutError:
            self.release()
            raise lacking("learner", placement.bundles, strategy=placement.strategy, waited_s=wait_s) from None

    def rank(self, number: int) -> Berth:
        return holding(self._asked.rank) | _inside(self._group, number)

    async def worker(self, number: int) -> Berth:
        """Once there is room, for which it may wait for ever. It is kept for whoever comes in the worker's place."""
        from ray.util.placement_group import placement_group

        berth = holding(self._asked.worker)
        if number < self._asked.num_seated:
            return berth | _inside(self._group, number)
        if not self._asked.worker:
            return berth
        if number not in self._rooms:
            self._rooms[number] = placement_group([self._asked.worker])
        await self._rooms[number].ready()
        return berth | _inside(self._rooms[number], 0)

    def release(self) -> None:
        """Give the room back, which ends who is in it."""
        from ray.util.placement_group import remove_placement_group

        for group in (self._group, *self._rooms.values()):
            if group is not None:
                remove_placement_group(group)
        self._placement = self._group = None
        self._rooms.clear()

    @property
    def _asked(self) -> Placement:
        assert self._placement is not None, "gather first"
        return self._placement


def _inside(group: Any, bundle: int) -> Berth:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if group is None:
        return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)}
