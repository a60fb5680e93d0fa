"""The plan's choice of how weights travel, with its reason, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.config_resources import ResourcesConfig
from potstill.config_weights import WeightsConfig
from potstill.errors import PlanError
from potstill.transports.delta import Delta
from potstill.transports.disk import Disk
from potstill.transports.object_store import ObjectStore
from potstill.transports.route import Route, choose, expected_links, link_between, open_transport
from potstill.transports.shared_memory import SharedMemory


def chosen(**changes: Any) -> Route:
    """Of a student without adapters on one host that vLLM writes with, but for the changes."""
    where = {"same_host": True, "lora": False, "followed": False, "dtype": "float32", "engine": "vllm", "devices": ""}
    where |= {name: changes.pop(name) for name in where if name in changes}
    return choose(WeightsConfig(**changes), **where)


def links(layout: str = "separate", *, learner: float = 0, rollout: float = 0, workers: int = 1) -> str:
    processes = {"learner": {"cpus": 1, "gpus": learner}, "rollout": {"cpus": 1, "gpus": rollout}}
    return expected_links(ResourcesConfig.model_validate({"layout": layout, **processes}), num_workers=workers)


def test_memory_is_taken_where_it_is_shared_and_rays_store_elsewhere() -> None:
    assert (chosen().transport, chosen(same_host=False).transport) == ("shared_memory", "object_store")
    assert chosen(wire="delta").transport == "object_store"
    assert chosen(transport="disk").transport == "disk"
    assert "share a host" in chosen().reason


def test_an_adapter_travels_alone_unless_somebody_needs_the_whole_student() -> None:
    assert chosen(lora=True).adapter_only
    assert not chosen().adapter_only
    assert not chosen(lora=True, adapter_only=False).adapter_only
    followed = chosen(lora=True, followed=True)
    assert not followed.adapter_only
    assert "merged" in followed.reason


def test_from_device_to_device_only_where_it_is_asked_for_and_with_what_carries_it() -> None:
    assert all(chosen(same_host=near).transport != "device" for near in (True, False))
    asked = chosen(transport="device", devices="by pigeon", wire="bfloat16", same_host=False)
    assert (asked.transport, asked.wire) == ("device", "bfloat16")
    assert asked.reason.endswith("by pigeon")
    merged = chosen(transport="device", lora=True, adapter_only=False)
    assert not merged.adapter_only


def test_a_link_is_found_by_where_both_ends_lie() -> None:
    assert link_between("GPU-1", "GPU-2") == "nccl"
    assert link_between("GPU-1", "GPU-1") == "ipc"
    assert {link_between("cpu", "cpu"), link_between("cpu", "GPU-1"), link_between("GPU-1", "cpu")} == {"gloo"}


def test_the_plan_names_the_links_that_the_layout_leads_to() -> None:
    assert links().startswith("gloo from CPU to CPU")
    assert links(learner=1).startswith("gloo, since only one side")
    assert links(learner=2, rollout=1, workers=3).startswith("NCCL, since")
    assert links(learner=0.5, rollout=0.5) == "NCCL between GPUs, CUDA IPC where both hold a share of the same"
    assert links("colocated", learner=0.5, rollout=0.5) == "CUDA IPC to worker 0, which shares rank 0's GPU"
    assert links("colocated", learner=0.5, rollout=0.5, workers=3).endswith(", NCCL to the other 2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transport": "shared_memory", "same_host": False}, 'write "object_store"'),
        ({"transport": "shared_memory", "wire": "delta"}, 'write wire = "exact"'),
        ({"wire": "bfloat16", "dtype": "bfloat16"}, "bfloat16 already"),
        ({"transport": "device", "engine": "transformers"}, 'write rollout.engine = "vllm"'),
        ({"transport": "device", "wire": "delta"}, 'write wire = "exact"'),
        ({"transport": "device", "followed": True}, 'write "auto"'),
        ({"transport": "device", "lora": True}, 'write "auto"'),
    ],
)
def test_settings_that_cannot_be_had_together_are_refused_with_the_fix(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        chosen(**settings)


def test_a_route_opens_the_transport_that_it_names(tmp_path: Path) -> None:
    for name, kind in (("shared_memory", SharedMemory), ("object_store", ObjectStore), ("disk", Disk)):
        route = Route(transport=name, wire="exact", adapter_only=False, reason="")  # type: ignore[arg-type]
        transport = open_transport(route, tmp_path)
        assert isinstance(transport, kind)
        transport.close()
    delta = open_transport(Route(transport="disk", wire="delta", adapter_only=False, reason=""), tmp_path)
    assert isinstance(delta, Delta)
    delta.close()
