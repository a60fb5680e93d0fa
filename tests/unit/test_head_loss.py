"""Chunked equals dense, for every objective, and no chunk outlives its turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.logprobs import RowLoss, head_loss
from learner.objective import Targets, row_loss
from potstill.methods import PRESETS, Objective

ROWS, WIDTH, VOCABULARY, K = 13, 5, 9, 3
OBJECTIVES = {
    **{name: method.objective for name, method in PRESETS.items()},
    "full_reverse_kl": Objective(support="full", divergence="reverse_kl"),
    "full_jsd": Objective(support="full", divergence="jsd", beta=0.3),
    "teacher_topk_forward_kl": Objective(support="teacher_topk", divergence="forward_kl", k=K),
}


class Ledger(TorchDispatchMode):
    """Counts the elements of all tensors that operators made and that are still alive; views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self._made(tensor)
        return result

    def _made(self, tensor: Tensor) -> None:
        size = tensor.numel()
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        finalize(tensor, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_targets(rows: int = ROWS, vocabulary: int = VOCABULARY) -> Targets:
    teacher_logits = some(rows, vocabulary, seed=1)
    teacher = teacher_logits.log_softmax(-1)
    support_ids = teacher.topk(K).indices
    kept = teacher.gather(-1, support_ids)
    token_ids = some(rows, vocabulary, seed=2).argmax(-1)
    return Targets(
        token_ids=token_ids,
        behaviour=some(rows, seed=3) - 2,
        teacher=teacher.gather(-1, token_ids[:, None]).squeeze(-1),
        support_ids=support_ids,
        teacher_support=kept,
        teacher_rest=(1 - kept.exp().sum(-1)).log(),
        teacher_logits=lambda rows: teacher_logits[rows],
    )


def leaves(*, rows: int = ROWS, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    return some(rows, WIDTH, seed=4).requires_grad_(), some(vocabulary, WIDTH, seed=5).requires_grad_()


def squares(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The simplest row loss that has a gradient everywhere."""
    return logits.square().sum(-1), {"first": logits.detach()[:, 0]}


@pytest.mark.parametrize("chunk_tokens", [1, 4, ROWS, 100])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_chunked_equals_dense_in_value_gradients_and_metrics(objective: Objective, chunk_tokens: int) -> None:
    loss_of_rows, weights = row_loss(objective, some_targets()), some(ROWS, seed=6).abs()

    hidden, head = leaves()
    losses, metrics = loss_of_rows(hidden @ head.T, slice(0, ROWS))
    dense = (weights * losses).sum()
    expected = torch.autograd.grad(dense, (hidden, head))

    chunked, sums = head_loss(hidden, head, loss_of_rows, weights=weights, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(chunked, dense, rtol=1e-12, atol=0)
    for found, wanted in zip(torch.autograd.grad(chunked, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
    assert sums.keys() == metrics.keys()
    for name, values in metrics.items():
        torch.testing.assert_close(sums[name], values.detach().sum(), rtol=1e-12, atol=0)


def test_the_gradient_is_scaled_by_what_comes_after() -> None:
    hidden, head = leaves()
    loss, _ = head_loss(hidden, head, squares, weights=torch.ones(ROWS), chunk_tokens=4)
    once = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, head))
    for left, right in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * left, right)


@pytest.mark.parametrize("trained", ["hidden", "head"])
def test_only_the_side_that_is_trained_gets_a_gradient(trained: str) -> None:
    hidden, head = leaves()
    frozen = head if trained == "hidden" else hidden
    frozen.requires_grad_(False)
    loss, _ = head_loss(hidden, head, squares, weights=torch.ones(ROWS), chunk_tokens=4)
    loss.backward()
    assert frozen.grad is None
    assert (hidden if trained == "hidden" else head).grad is not None


def test_a_metric_that_is_missing_in_one_row_is_missing_in_the_sum() -> None:
    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        values = torch.ones(len(logits))
        values[0] = torch.nan if rows.start == 4 else 1
        return logits.sum(-1), {"partly": values, "whole": torch.ones(len(logits))}

    _, sums = head_loss(*leaves(), loss, weights=torch.ones(ROWS), chunk_tokens=4)
    assert sums["partly"].isnan()
    assert sums["whole"] == ROWS


def test_rows_say_which_part_of_the_batch_a_chunk_is() -> None:
    seen: list[slice] = []

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        seen.append(rows)
        return logits.sum(-1), {}

    head_loss(*leaves(), loss, weights=torch.ones(ROWS), chunk_tokens=5)
    assert seen == [slice(0, 5), slice(5, 10), slice(10, 13)]


def test_bfloat16_states_give_float32_logits_and_a_gradient_of_their_own_dtype() -> None:
    dtypes: list[torch.dtype] = []

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        dtypes.append(logits.dtype)
        return logits.sum(-1), {}

    hidden, head = (leaf.detach().bfloat16().requires_grad_() for leaf in leaves())
    total, _ = head_loss(hidden, head, loss, weights=torch.ones(ROWS), chunk_tokens=8)
    assert total.dtype == torch.float32
    assert set(dtypes) == {torch.float32}
    assert {g.dtype for g in torch.autograd.grad(total, (hidden, head))} == {torch.bfloat16}


def ledger_of(loss: RowLoss, *, rows: int, vocabulary: int, chunk_tokens: int) -> Ledger:
    """What one forward and backward pass allocates."""
    hidden, head = leaves(rows=rows, vocabulary=vocabulary)
    weights = torch.ones(rows)
    with Ledger() as ledger:
        total, _ = head_loss(hidden, head, loss, weights=weights, chunk_tokens=chunk_tokens)
        total.backward()
    return ledger


@pytest.mark.parametrize("name", ["opd_sampled", "opd", "gkd", "sft"])
def test_no_tensor_is_larger_than_one_chunk_of_logits_and_no_chunk_outlives_its_turn(name: str) -> None:
    vocabulary, chunk = 200, 8
    few, many = (
        ledger_of(
            row_loss(OBJECTIVES[name], some_targets(rows, vocabulary)),
            rows=rows,
            vocabulary=vocabulary,
            chunk_tokens=chunk,
        )
        for rows in (2 * chunk, 20 * chunk)
    )
    assert few.largest == many.largest == chunk * vocabulary
    growth_of_grad_hidden = 2 * WIDTH * 18 * chunk  # as it is formed, and as it is handed on
    assert many.peak - few.peak <= growth_of_grad_hidden


def test_the_ledger_sees_a_dense_loss_and_a_hoarded_chunk() -> None:
    """The test above can fail."""
    hoard: list[Tensor] = []

    def hoarding(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        hoard.append(2 * logits.detach())
        return squares(logits, rows)

    def peak(loss: RowLoss, chunk_tokens: int) -> int:
        return ledger_of(loss, rows=16, vocabulary=200, chunk_tokens=chunk_tokens).peak

    assert ledger_of(squares, rows=16, vocabulary=200, chunk_tokens=16).largest == 16 * 200
    assert peak(hoarding, 4) >= peak(squares, 4) + 3 * 4 * 200
