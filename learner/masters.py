"""What the optimizer moves: the trained weights themselves or, behind those in bfloat16, the same weights in float32.

    gradient of a pass ──► added up in float32 ──► AdamW moves the float32 weight ──► rounded, it is the student's

bfloat16 has eight significant bits: an update below 1/512 of a weight rounds to nothing, and at the learning rates of
distillation nearly all are; so do late terms of a long sum of gradients (Micikevicius et al., arXiv 1710.03740, §3.1).
It costs 16 bytes a trained parameter (weight, gradient, two moments) beside the 2 that the passes read.

Refuses to know passes, losses and schedules.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learner.logprobs import accumulator
from learner.model import CausalModel
from potstill.errors import ConfigError


class Masters:
    """Of one student, by the names that its network's parameters have. Over several ranks they lie as those do."""

    def __init__(self, student: CausalModel) -> None:
        trained = {name: p for name, p in student.network.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {name: _behind(parameter) for name, parameter in trained.items()}
        self._ranks = student.ranks
        self._rounded = {name: p for name, p in trained.items() if p is not self.weights[name]}

    def gradients(self) -> list[Tensor]:
        """Of a step's passes so far, of the weights that had one."""
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]

    @torch.no_grad()
    def settle(self) -> None:
        """After the optimizer moved: the student's weights are these, rounded."""
        for name, parameter in self._rounded.items():
            parameter.copy_(self.weights[name])

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep beside the student's own weights."""
        return self._ranks.whole({name: self.weights[name] for name in self._rounded})

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises ConfigError when it is another run's."""
        if state.keys() != self._rounded.keys():
            raise ConfigError("the checkpoint is of another student.dtype; continue with the config that wrote it")
        for name, weight in state.items():
            self.weights[name].copy_(self._ranks.lay(weight, like=self.weights[name]))


def _behind(parameter: nn.Parameter) -> Tensor:
    """Itself where it is precise enough; else a copy that takes over each gradient as soon as it is there."""
    wide = accumulator(parameter.dtype)
    if wide == parameter.dtype:
        return parameter
    master = parameter.detach().to(wide, copy=True).requires_grad_()

    def take(narrow: Tensor) -> None:
        assert narrow.grad is not None
        gradient, narrow.grad = narrow.grad.to(wide), None
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    return master
