"""The student's weights as one flat, checksummed buffer of bytes: what a weights version is made of.

Copies out of the model; never hands out memory that the next optimizer step will overwrite. Where the buffer travels
is the actor's business.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.model import CausalModel
from potstill.types import WeightsVersion
from potstill.weights import pack


@torch.no_grad()
def snapshot(student: CausalModel, *, version: int) -> tuple[WeightsVersion, NDArray[np.uint8]]:
    """The whole model by the transformer's names, adapters merged, tied weights once; the version has no payload."""
    return pack({name: as_numpy(weight) for name, weight in student.full_weights().items()}, version=version)


def as_numpy(weight: Tensor) -> NDArray[np.generic]:
    """A view on the CPU. numpy has no bfloat16: its bits travel as uint16."""
    weight = weight.detach().cpu().contiguous()
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()
