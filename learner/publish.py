"""The student's weights as a version that travels: all of them by the transformer's names, or its adapter alone.

Copies out of the model; never hands out memory that the next optimizer step will overwrite. Where the bytes lie is the
transport's business.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.model import CausalModel
from potstill.errors import WeightsError
from potstill.transports import Transport
from potstill.transports.route import Route
from potstill.types import WeightsVersion
from potstill.weights import Bytes, fresh, pack


class Publisher:
    """Sends versions of one student the way that `route` says."""

    def __init__(self, route: Route, transport: Transport) -> None:
        self._route = route
        self._transport = transport

    def publish(self, student: CausalModel, *, version: int) -> WeightsVersion:
        """Raises WeightsError when the transport has no room."""
        described, payload = snapshot(student, version=version, route=self._route, transport=self._transport)
        return replace(described, payload=self._transport.send(payload, version))

    def close(self) -> None:
        self._transport.close()


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
    scale = None
    if route is not None and route.adapter_only:
        tensors, scale = adapter(student)
    else:
        tensors = student.full_weights()
    if route is not None and route.wire == "bfloat16":
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    return student.ranks.whole(tensors), scale


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
