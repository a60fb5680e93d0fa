"""Weights that travelled as numpy, seen as torch tensors. Nothing is copied."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from potstill.weights import Array


def as_tensor(array: Array) -> Tensor:
    """A view to read from; uint16 holds the bits of bfloat16."""
    with warnings.catch_warnings():
        # Shared memory is read-only, which torch cannot express; both engines copy what they are given.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
