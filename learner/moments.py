"""What an optimizer remembers of each parameter, as tensors by name: so that a checkpoint needs no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner.ranks import Ranks


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """By "name/kind", e.g. "model.norm.weight/exp_avg", until the next step. None of one that never had a gradient.

    ranks  over whom the parameters lie; rank 0 gets them whole, the others nothing
    """
    found = {
        f"{name}/{kind}": torch.as_tensor(value).detach()
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    return ranks.whole(found)


def load_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    ranks: Ranks,
) -> None:
    """Put back what `moments` gave, in place of what is there."""
    for parameter in parameters.values():
        optimizer.state.pop(parameter, None)
    for key, value in found.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = ranks.lay(value, like=parameter)
