"""What an optimizer remembers of each parameter, as tensors by name: so that a checkpoint needs no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU by "name/kind", e.g. "model.norm.weight/exp_avg". None of one that never had a gradient."""
    return {
        f"{name}/{kind}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Put back what `moments` gave, in place of what is there."""
    for parameter in parameters.values():
        optimizer.state.pop(parameter, None)
    for key, value in found.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.to(parameter.device)  # a fused AdamW keeps its step count there too
