"""Which way the weights of a run travel, and why. Pure, but for `open_transport`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from potstill.config import RunConfig
from potstill.config_resources import ResourcesConfig
from potstill.config_teachers import ServerTeacher
from potstill.config_weights import WeightsConfig
from potstill.errors import PlanError
from potstill.transports import Transport
from potstill.transports.delta import Delta
from potstill.transports.disk import KEEP, Disk
from potstill.transports.object_store import ObjectStore
from potstill.transports.shared_memory import SharedMemory

Engine = Literal["vllm", "transformers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What plan.json says of the weights."""

    transport: Literal["shared_memory", "object_store", "disk", "device"]
    wire: Literal["exact", "bfloat16", "delta"]
    adapter_only: bool
    reason: str


def choose(
    config: WeightsConfig, *, same_host: bool, lora: bool, followed: bool, dtype: str, engine: Engine, devices: str
) -> Route:
    """The route of a run.

    same_host  whether every worker shares the learner's memory
    lora       whether the student learns by adapters
    followed   whether a teacher is made of the student's weights, which are then needed whole
    dtype      of the student's weights
    engine     of the workers
    devices    how weights get from device to device there, in words
    Raises PlanError for settings that cannot be had together.
    """
    if config.transport == "shared_memory" and not same_host:
        raise PlanError('weights.transport = "shared_memory" reaches one host: write "object_store" or "auto"')
    if config.wire == "bfloat16" and dtype == "bfloat16":
        raise PlanError('weights.wire = "bfloat16": the student\'s weights are bfloat16 already; write "exact"')
    adapter_only = lora and config.adapter_only and not followed
    transport, reason = config.transport, "as weights.transport says"
    if transport == "device":
        _refuse_device(config, engine, followed=followed, adapter_only=adapter_only)
        reason += f"; {devices}"
    elif transport == "auto" and same_host and config.wire != "delta":
        transport, reason = "shared_memory", "learner and workers share a host"
    elif transport == "auto":
        transport = "object_store"
        reason = "a delta needs a transport that keeps versions" if same_host else "workers are on other hosts"
    if config.wire == "delta" and transport == "shared_memory":
        raise PlanError('weights.wire = "delta" costs more than shared memory does: write wire = "exact"')
    if adapter_only:
        reason += "; only the adapter travels"
    elif lora and config.adapter_only:
        reason += "; a teacher follows the student, so that its adapter is merged before it travels"
    return Route(transport=transport, wire=config.wire, adapter_only=adapter_only, reason=reason)


def _refuse_device(config: WeightsConfig, engine: Engine, *, followed: bool, adapter_only: bool) -> None:
    """What only goes through the memory of hosts."""
    refused = 'weights.transport = "device"'
    if engine != "vllm":
        raise PlanError(f'{refused} loads into vLLM: write rollout.engine = "vllm", or transport = "auto"')
    if config.wire == "delta":
        raise PlanError(f'{refused} keeps no version that a delta could be laid over: write wire = "exact"')
    if followed:
        raise PlanError(f'{refused}: a teacher that follows the student reads it from memory; write "auto"')
    if adapter_only:
        raise PlanError(f'{refused}: a worker adds an adapter to its base in memory; write "auto", it is small')


def route_of(config: RunConfig, *, same_host: bool) -> Route:
    """The route of a run's weights. Raises PlanError for settings that cannot be had together."""
    teacher = config.teacher
    followed = isinstance(teacher, ServerTeacher) and teacher.follows != "nobody"
    if followed and config.weights.wire == "bfloat16":
        raise PlanError('teacher.follows wants the student\'s own weights: write weights.wire = "exact"')
    return choose(
        config.weights,
        same_host=same_host,
        lora=config.student.lora is not None,
        followed=followed,
        dtype=config.student.dtype,
        engine=config.rollout.engine,
        devices=expected_links(config.resources, num_workers=config.rollout.workers),
    )


def link_between(learner: str, worker: str) -> Literal["gloo", "nccl", "ipc"]:
    """What carries weights from one device to another; both are named by links.name_of, "cpu" or a GPU's UUID."""
    if "cpu" in (learner, worker):
        return "gloo"
    return "ipc" if learner == worker else "nccl"


def expected_links(resources: ResourcesConfig, *, num_workers: int) -> str:
    """What `link_between` will find, in words. Which GPU a share lies on is known once a process is there."""
    shares = (resources.learner.gpus, resources.rollout.gpus)
    if not any(shares):
        return "gloo from CPU to CPU; where nobody asked for GPUs and there are some, all use the first, over CUDA IPC"
    if not all(shares):
        return "gloo, since only one side asks for GPUs"
    if resources.layout == "colocated":
        others = f", NCCL to the other {num_workers - 1}" if num_workers > 1 else ""
        return f"CUDA IPC to worker 0, which shares rank 0's GPU{others}"
    if all(share < 1 for share in shares):
        return "NCCL between GPUs, CUDA IPC where both hold a share of the same"
    return "NCCL, since learner and workers hold GPUs of their own"


def open_transport(route: Route, folder: Path) -> Transport:
    """The learner's side of a route through memory; "device" is the learner's own (learner/outbox.py).

    folder  for files, where the route is over the disk
    """
    transport: Transport
    if route.transport == "shared_memory":
        transport = SharedMemory()
    elif route.transport == "object_store":
        transport = ObjectStore()
    else:
        transport = Disk(folder, keep=2 * KEEP if route.wire == "delta" else KEEP)  # a delta is a file of its own
    return Delta(transport) if route.wire == "delta" else transport
