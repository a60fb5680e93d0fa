"""Random logits of a vocabulary that can be enumerated, gradients with respect to them, and facts of completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learner.facts import Facts, Moment

V = 5
NOW = Moment(step=1, steps=10, schedule={})
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def logits(*, seed: int, shape: tuple[int, ...] = (V,)) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logprobs(*, seed: int, shape: tuple[int, ...] = (V,)) -> Tensor:
    return logits(seed=seed, shape=shape).log_softmax(-1)


def gradient(value: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(value(z), z)[0]


def completions(*lengths: int, **facts: Any) -> Facts:
    zeros = torch.zeros(sum(lengths), dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Facts(**{"token_ids": zeros, "lengths": lengths, "positions": positions, "origin": zeros, **facts})
