"""The student's weights as a version that travels: all of them by the transformer's names, or its adapter alone.

Copies out of the model; never hands out memory that the next optimizer step will overwrite. Where the bytes lie is the
transport's business, and whether they pass through the CPU's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.model import CausalModel
from potstill.errors import WeightsError
from potstill.transports import Transport
from potstill.transports.route import Route, open_transport
from potstill.types import WeightsVersion
from potstill.weights import Bytes, fresh, laid_out, pack, sealed

if TYPE_CHECKING:
    from learner.outbox import Outbox


class Sender(Protocol):
    """What the learner publishes with."""

    def publish(self, student: CausalModel, *, version: int) -> WeightsVersion:
        """Raises WeightsError when there is no room for it. Of several ranks only the first has a sender; meanwhile
        the others call `gathered`."""
        ...

    def close(self) -> None: ...


def open_sender(route: Route, *, folder: Path, host: str) -> Sender:
    """folder: for files; host: this machine's address, as workers reach it."""
    if route.transport != "device":
        return Publisher(route, open_transport(route, folder))
    from learner.outbox import Outbox

    return DevicePublisher(route, Outbox(host))


class Publisher:
    """Sends versions of one student the way that `route` says."""

    def __init__(self, route: Route, transport: Transport) -> None:
        self._route = route
        self._transport = transport

    def publish(self, student: CausalModel, *, version: int) -> WeightsVersion:
        described, payload = snapshot(student, version=version, route=self._route, transport=self._transport)
        return replace(described, payload=self._transport.send(payload, version))

    def close(self) -> None:
        self._transport.close()


class DevicePublisher:
    """Sends versions that never leave the devices: copied into the outbox's room, and summed up there."""

    def __init__(self, route: Route, outbox: Outbox) -> None:
        self._route = route
        self._outbox = outbox

    @torch.no_grad()
    def publish(self, student: CausalModel, *, version: int) -> WeightsVersion:
        return self.send(_sent(student, self._route)[0], version=version)

    @torch.no_grad()
    def send(self, tensors: Mapping[str, Tensor], *, version: int) -> WeightsVersion:
        """Shards are put together, one tensor at a time."""
        from potstill.transports import rows

        table = laid_out((name, str(one.dtype).removeprefix("torch."), one.shape) for name, one in tensors.items())
        room = self._outbox.room(table[-1].offset + rows.padded(table[-1].nbytes))
        for entry, shard in zip(table, tensors.values(), strict=True):
            rows.tensor(room, entry).copy_(shard.full_tensor() if isinstance(shard, DTensor) else shard)
        described = WeightsVersion(
            version=version,
            digest="",
            checksums=tuple(rows.sums([rows.row(room, entry) for entry in table])),  # waits until all of it is copied
            tensors=table,
            payload=self._outbox.send(version, table),
            rounded=self._route.wire == "bfloat16",
        )
        return sealed(described)

    def close(self) -> None:
        self._outbox.close()


@torch.no_grad()
def snapshot(
    student: CausalModel, *, version: int, route: Route | None = None, transport: Transport | None = None
) -> tuple[WeightsVersion, Bytes]:
    """The whole model, adapters merged, tied weights once, unless `route` says less; the version has no payload.

    Lies in the room of `transport`, or in new memory without one. Of several ranks only the first can; meanwhile the
    others call `gathered`.
    """
    tensors, scale = gathered(student, route)
    return pack(
        {name: as_numpy(tensor) for name, tensor in tensors.items()},
        version,
        room=fresh if transport is None else transport.room,
        adapter_scale=scale,
        rounded=route is not None and route.wire == "bfloat16",
    )


@torch.no_grad()
def gathered(student: CausalModel, route: Route | None = None) -> tuple[dict[str, Tensor], float | None]:
    """What travels, and the scale of an adapter that travels alone. Of several ranks the first has it; all call."""
    tensors, scale = _sent(student, route)
    return student.ranks.whole(tensors), scale


def _sent(student: CausalModel, route: Route | None) -> tuple[dict[str, Tensor], float | None]:
    """What travels, as it lies: shards, of several ranks."""
    scale = None
    if route is not None and route.adapter_only:
        tensors, scale = adapter(student)
    else:
        tensors = student.full_weights()
    if route is not None and route.wire == "bfloat16":
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    return tensors, scale


def adapter(student: CausalModel) -> tuple[dict[str, Tensor], float]:
    """A and B of every matrix that has an adapter, as float32 under the matrix's own name, and their common scale."""
    tensors: dict[str, Tensor] = {}
    scales: set[float] = set()
    for name, module in student.transformer.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        for part in ("lora_A", "lora_B"):
            tensors[f"{name}.{part}.weight"] = getattr(module, part)["default"].weight.float()
        scales.add(module.scaling["default"])
    if len(scales) != 1:
        raise WeightsError(f"an adapter that travels alone needs one scale, this student has {sorted(scales)}")
    return tensors, scales.pop()


def as_numpy(weight: Tensor) -> NDArray[np.generic]:
    """A view on the CPU. numpy has no bfloat16: its bits travel as uint16."""
    weight = weight.detach().cpu().contiguous()
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()
