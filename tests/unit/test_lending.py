"""Weights lent to other processes: the same bits there, and no memory left when the lender takes them back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.errors import WeightsError
from rollout_worker.lending import Lent, lent

WEIGHTS = {
    "wide": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(7, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "scalar": torch.tensor(2.5),
}


def read(message: bytes) -> dict[str, list[object]]:
    return {name: [str(tensor.dtype), tensor.tolist()] for name, tensor in pickle.loads(message)}  # noqa: S301


def test_another_process_reads_the_same_tensors() -> None:
    with lent(WEIGHTS.items()) as found, multiprocessing.get_context("spawn").Pool(1) as pool:
        message = pickle.dumps(found)
        assert len(message) < 1000
        assert pool.apply(read, (message,)) == read(pickle.dumps(list(WEIGHTS.items())))


def test_what_was_mapped_stays_and_nothing_else_does() -> None:
    with lent(WEIGHTS.items()) as found:
        kept: dict[str, Tensor] = dict(found)
    assert all(torch.equal(kept[name], WEIGHTS[name]) for name in WEIGHTS)
    assert not Path(found.path).exists()
    with pytest.raises(RuntimeError):
        Lent(found.path, found.table).memory()


def test_memory_is_given_back_when_laying_out_fails() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(WeightsError, match="float64"), lent([("a", torch.zeros(1, dtype=torch.float64))]):
        pass
    assert len(os.listdir("/proc/self/fd")) == len(before)
