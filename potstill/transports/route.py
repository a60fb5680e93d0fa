"""Which way the weights of a run travel, and why. Pure, but for `open_transport`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from potstill.config import RunConfig
from potstill.config_teachers import ServerTeacher
from potstill.config_weights import WeightsConfig
from potstill.errors import PlanError
from potstill.transports import Transport
from potstill.transports.delta import Delta
from potstill.transports.disk import KEEP, Disk
from potstill.transports.object_store import ObjectStore
from potstill.transports.shared_memory import SharedMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What plan.json says of the weights."""

    transport: Literal["shared_memory", "object_store", "disk"]
    wire: Literal["exact", "bfloat16", "delta"]
    adapter_only: bool
    reason: str


def choose(config: WeightsConfig, *, same_host: bool, lora: bool, followed: bool, dtype: str) -> Route:
    """The route of a run.

    same_host  whether every worker shares the learner's memory
    lora       whether the student learns by adapters
    followed   whether a teacher is made of the student's weights, which are then needed whole
    dtype      of the student's weights
    Raises PlanError for settings that cannot be had together.
    """
    if config.transport == "shared_memory" and not same_host:
        raise PlanError('weights.transport = "shared_memory" reaches one host: write "object_store" or "auto"')
    if config.wire == "bfloat16" and dtype == "bfloat16":
        raise PlanError('weights.wire = "bfloat16": the student\'s weights are bfloat16 already; write "exact"')
    transport, reason = config.transport, "as weights.transport says"
    if transport == "auto" and same_host and config.wire != "delta":
        transport, reason = "shared_memory", "learner and workers share a host"
    elif transport == "auto":
        transport = "object_store"
        reason = "a delta needs a transport that keeps versions" if same_host else "workers are on other hosts"
    if config.wire == "delta" and transport == "shared_memory":
        raise PlanError('weights.wire = "delta" costs more than shared memory does: write wire = "exact"')
    adapter_only = lora and config.adapter_only and not followed
    if adapter_only:
        reason += "; only the adapter travels"
    elif lora and config.adapter_only:
        reason += "; a teacher follows the student, so that its adapter is merged before it travels"
    return Route(transport=transport, wire=config.wire, adapter_only=adapter_only, reason=reason)


def route_of(config: RunConfig, *, same_host: bool) -> Route:
    """The route of a run's weights. Raises PlanError for settings that cannot be had together."""
    teacher = config.teacher
    followed = isinstance(teacher, ServerTeacher) and teacher.follows != "nobody"
    if followed and config.weights.wire == "bfloat16":
        raise PlanError('teacher.follows wants the student\'s own weights: write weights.wire = "exact"')
    lora = config.student.lora is not None
    return choose(config.weights, same_host=same_host, lora=lora, followed=followed, dtype=config.student.dtype)


def open_transport(route: Route, folder: Path) -> Transport:
    """The learner's side. `folder`: for files, where the route is over the disk."""
    transport: Transport
    if route.transport == "shared_memory":
        transport = SharedMemory()
    elif route.transport == "object_store":
        transport = ObjectStore()
    else:
        transport = Disk(folder, keep=2 * KEEP if route.wire == "delta" else KEEP)  # a delta is a file of its own
    return Delta(transport) if route.wire == "delta" else transport
