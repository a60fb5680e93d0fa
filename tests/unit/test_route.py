"""The plan's choice of how weights travel, with its reason, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.config_weights import WeightsConfig
from potstill.errors import PlanError
from potstill.transports.delta import Delta
from potstill.transports.disk import Disk
from potstill.transports.object_store import ObjectStore
from potstill.transports.route import Route, choose, open_transport
from potstill.transports.shared_memory import SharedMemory


def chosen(
    *, same_host: bool = True, lora: bool = False, followed: bool = False, dtype: str = "float32", **config: Any
):
    return choose(WeightsConfig(**config), same_host=same_host, lora=lora, followed=followed, dtype=dtype)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transport": "shared_memory", "same_host": False}, 'write "object_store"'),
        ({"transport": "shared_memory", "wire": "delta"}, 'write wire = "exact"'),
        ({"wire": "bfloat16", "dtype": "bfloat16"}, "bfloat16 already"),
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
