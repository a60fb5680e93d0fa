"""What arrives as a weights version, made into the tensors of the student: checked, and adapters merged.

The base that an adapter is added to is the student's folder, read again for each version rather than kept: a page
cache holds it as well, and the other weights are taken from there without a copy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from potstill.errors import WeightsError
from potstill.transports.device import Stream
from potstill.types import WeightsVersion
from potstill.weights import Bytes, check_fits, check_seal, shapes_in, unpack
from rollout_worker.arriving import Coming, Here, Weights
from rollout_worker.tensors import as_tensor

A, B = ".lora_A.weight", ".lora_B.weight"  # [rank, in] and [out, rank], after the name of the matrix without .weight


class Incoming:
    """Of one student."""

    def __init__(self, model: Path, dtype: str) -> None:
        self._model = model
        self._dtype = dtype
        self.shapes = shapes_in(model)

    def weights(self, version: WeightsVersion, opened: Bytes | Stream) -> Weights:
        """What an engine loads. Raises WeightsError for what is damaged or not the student's, as far as it is here."""
        if isinstance(opened, np.ndarray):
            return Here(self.tensors(version, opened))
        check_seal(version)
        check_fits(version, self.shapes, self._dtype)
        return Coming(version, opened)

    def tensors(self, version: WeightsVersion, payload: Bytes) -> dict[str, Tensor]:
        """Every weight of the student by name, on the CPU. Rounded ones are bfloat16; those that read them widen them.

        Most are views into `payload`. Raises WeightsError for what is damaged or not the student's.
        """
        if version.adapter_scale is None:
            check_fits(version, self.shapes, self._dtype)
        sent = {name: as_tensor(array) for name, array in unpack(version, payload).items()}
        return sent if version.adapter_scale is None else self._merged(sent, version.adapter_scale)

    def base(self) -> dict[str, Tensor]:
        """The student's weights as its folder has them."""
        found: dict[str, Tensor] = {}
        for file in sorted(self._model.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys() if name in self.shapes}  # noqa: SIM118
        return found

    def _merged(self, sent: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """The base with scale · B·A added to each matrix that has an adapter, as learner/model.py does it."""
        weights = {name: weight.to(getattr(torch, self._dtype)) for name, weight in self.base().items()}
        for name in [name.removesuffix(A) for name in sent if name.endswith(A)]:
            low, high = sent.pop(name + A).float(), sent.pop(name + B, None)
            weight = weights.get(f"{name}.weight")
            if weight is None or high is None or (high.shape[0], low.shape[1]) != weight.shape:
                raise WeightsError(f"the adapter of {name} does not fit the student")
            weights[f"{name}.weight"] = weight + (high.float() @ low * scale).to(weight.dtype)
        if sent:
            raise WeightsError(f"an adapter was sent with tensors that it does not have: {', '.join(sorted(sent))}")
        return weights
