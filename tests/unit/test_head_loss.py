"""Chunked equals dense, for every objective; by hand equals autograd; no chunk outlives its turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner import divergences
from learner.aggregation import subsets
from learner.chunk import ReadAhead
from learner.facts import Moment
from learner.logprobs import CACHED_LOGITS, RowLoss, head_loss
from learner.objective import row_loss
from potstill.algebra.objective import Objective, Tier
from potstill.methods import PRESETS
from tests.golden import distribution, make_facts

ROWS, WIDTH, VOCABULARY, K = 13, 5, 9, 3


def narrow(objective: Objective) -> Objective:
    """The same over K entries where it is over a top-k: the vocabularies here are small."""
    if not hasattr(objective.support, "k"):
        return objective
    return objective.model_copy(update={"support": objective.support.model_copy(update={"k": K})})


OBJECTIVES = {
    name: narrow(PRESETS[name].objective) for name in ("opd", "opd_sampled", "gkd", "gkd_topk", "opsd", "opsd_reverse")
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


Both = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_over(objective: Objective, rows: int = ROWS, vocabulary: int = VOCABULARY) -> RowLoss:
    """The objective's row loss over random facts, of a teacher behind HTTP or inside as the objective reads it."""
    teacher_logits = some(rows, vocabulary, seed=1)
    teacher = teacher_logits.log_softmax(-1)
    ids = teacher.topk(K).indices
    kept = teacher.gather(-1, ids)
    rest = (1 - kept.exp().sum(-1)).log()
    token_ids = some(rows, vocabulary, seed=2).argmax(-1)
    said = {
        "behaviour": some(rows, seed=3) - 2,
        "teacher": teacher.gather(-1, token_ids[:, None]).squeeze(-1),
        "support_ids": ids,
        "teacher_support": kept,
        "teacher_rest": rest,
        "topk_ids": ids,
        "teacher_topk": kept,
        "topk_rest": rest,
    }
    inside = distribution(teacher_logits) if objective.tier is Tier.FULL else said
    facts = make_facts([rows - 2, 2], token_ids=token_ids.tolist(), **inside)
    totals = subsets(facts.lengths, ["student", "student"])
    return row_loss(objective, facts, denominators=totals, moment=Moment(step=1, steps=1, schedule={}))


def leaves(*, rows: int = ROWS, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    return some(rows, WIDTH, seed=4).requires_grad_(), some(vocabulary, WIDTH, seed=5).requires_grad_()


def squares(logits: Tensor, rows: slice) -> Both:
    """The simplest row loss that has a gradient everywhere."""
    return {"squares": logits.square().sum()}, {"first": logits.detach()[:, 0]}


@pytest.mark.parametrize("chunk_tokens", [1, 4, ROWS, 100])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_chunked_equals_dense_in_value_gradients_and_measures(objective: Objective, chunk_tokens: int) -> None:
    loss_of_rows = loss_over(objective)

    hidden, head = leaves()
    losses, measures = loss_of_rows(hidden @ head.T, slice(0, ROWS))
    dense = sum(losses.values())
    expected = torch.autograd.grad(dense, (hidden, head))

    chunked, tally = head_loss(hidden, head, loss_of_rows, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(chunked, dense, rtol=1e-12, atol=0)
    for found, wanted in zip(torch.autograd.grad(chunked, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
    assert tally.losses["main"].item() == pytest.approx(dense.item(), rel=1e-12)
    assert tally.sums.keys() == measures.keys()
    for name, values in measures.items():
        torch.testing.assert_close(tally.sums[name], values.detach().sum(), rtol=1e-12, atol=0)
        assert tally.counts[name] == ROWS


def test_the_gradient_is_scaled_by_what_comes_after() -> None:
    hidden, head = leaves()
    loss, _ = head_loss(hidden, head, squares, chunk_tokens=4)
    once = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, head))
    for left, right in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * left, right)


@pytest.mark.parametrize("trained", ["hidden", "head"])
def test_only_the_side_that_is_trained_gets_a_gradient(trained: str) -> None:
    hidden, head = leaves()
    frozen = head if trained == "hidden" else hidden
    frozen.requires_grad_(False)
    loss, _ = head_loss(hidden, head, squares, chunk_tokens=4)
    loss.backward()
    assert frozen.grad is None
    assert (hidden if trained == "hidden" else head).grad is not None


def test_a_metric_that_is_missing_in_one_row_is_missing_in_the_sum() -> None:
    def loss(logits: Tensor, rows: slice) -> Both:
        values = torch.ones(len(logits))
        values[0] = torch.nan if rows.start == 4 else 1
        return {"sum": logits.sum()}, {"partly": values, "whole": torch.ones(len(logits))}

    _, tally = head_loss(*leaves(), loss, chunk_tokens=4)
    assert tally.sums["partly"].isnan()
    assert tally.sums["whole"] == ROWS


def test_rows_say_which_part_of_the_batch_a_chunk_is() -> None:
    seen: list[slice] = []

    def loss(logits: Tensor, rows: slice) -> Both:
        seen.append(rows)
        return {"sum": logits.sum()}, {}

    head_loss(*leaves(), loss, chunk_tokens=5)
    assert seen == [slice(0, 5), slice(5, 10), slice(10, 13)]


def test_bfloat16_states_give_float32_logits_and_a_gradient_of_their_own_dtype() -> None:
    dtypes: list[torch.dtype] = []

    def loss(logits: Tensor, rows: slice) -> Both:
        dtypes.append(logits.dtype)
        return {"sum": logits.sum()}, {}

    hidden, head = (leaf.detach().bfloat16().requires_grad_() for leaf in leaves())
    total, _ = head_loss(hidden, head, loss, chunk_tokens=8)
    assert total.dtype == torch.float32
    assert set(dtypes) == {torch.float32}
    assert {g.dtype for g in torch.autograd.grad(total, (hidden, head))} == {torch.bfloat16}


def test_a_chunk_is_taken_block_by_block_and_its_gradient_is_that_of_the_whole() -> None:
    few = torch.get_num_threads()  # the rows of a block of so large a vocabulary
    seen: list[slice] = []

    def loss(logits: Tensor, rows: slice) -> Both:
        seen.append(rows)
        counts = rows.start != 2 * few  # in the middle block no row does
        return {"cubes": logits.pow(3).sum()} if counts else {}, {}

    hidden, head = leaves(rows=5 * few, vocabulary=CACHED_LOGITS // few)
    chunked, _ = head_loss(hidden, head, loss, chunk_tokens=4 * few)
    assert [(rows.start, rows.stop) for rows in seen] == [(few * i, few * (i + 1)) for i in range(5)]
    counting = torch.arange(5 * few) // few != 2
    dense = (hidden[counting] @ head.T).pow(3).sum()
    torch.testing.assert_close(chunked, dense, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(total, (hidden, head)) for total in (chunked, dense))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_many_small_gradients_of_a_bfloat16_head_add_up() -> None:
    """256 chunks that each add 1: a sum in bfloat16 would stay at 256 once it is there, and rounds before."""
    rows = 300
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    total, _ = head_loss(hidden, head, lambda logits, rows: ({"sum": logits.sum()}, {}), chunk_tokens=1)
    assert torch.autograd.grad(total, head)[0].tolist() == [[rows], [rows]]


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "forward_kl": partial(divergences.forward_kl, pointwise_clip=None, zero_sum=False),
    "forward_kl, clipped": partial(divergences.forward_kl, pointwise_clip=0.001, zero_sum=False),
    "reverse_kl": divergences.reverse_kl,
    "jsd, 0.5": partial(divergences.jsd, beta=0.5),
    "jsd, 0.1": partial(divergences.jsd, beta=0.1),
    "skew_forward_kl": partial(divergences.skew_forward_kl, alpha=0.1),
    "skew_reverse_kl": partial(divergences.skew_reverse_kl, alpha=0.1, detach_mixture=False),
    "skew_reverse_kl, detached": partial(divergences.skew_reverse_kl, alpha=0.1, detach_mixture=True),
    "entropy": divergences.entropy,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_gradient_by_hand_is_that_of_autograd(name: str) -> None:
    """To 1e-10 in float64. In float32 log_softmax rounds both: by hand is as near to the truth, to 1e-6."""
    chosen = BY_HAND[name]
    function, choices = (chosen.func, chosen.keywords) if isinstance(chosen, partial) else (chosen, {})
    given = [3 * some(4, 1000, seed=seed).float() for seed in ((6,) if name == "entropy" else (6, 7))]

    def both(divergence: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = given[0].to(dtype).requires_grad_()
        value = divergence(logits.log_softmax(-1), *(other.to(dtype).log_softmax(-1) for other in given[1:]), **choices)
        return value, torch.autograd.grad((torch.arange(1, 5) * value).sum(), logits)[0]

    found, wanted = both(function, torch.float64), both(function.__wrapped__, torch.float64)
    for by_hand, true in zip(found, wanted, strict=True):
        assert (by_hand - true).norm() <= 1e-10 * true.norm()
    rounded, of_autograd = both(function, torch.float32), both(function.__wrapped__, torch.float32)
    for by_hand, plain, true in zip(rounded, of_autograd, wanted, strict=True):
        assert (by_hand - true).norm() <= 1.5 * (plain - true).norm() + 1e-6 * true.norm()


def test_a_gradient_by_hand_leaves_zeros_and_a_teacher_that_learns_to_the_definition() -> None:
    logq = torch.tensor([[0.5, 0.5, 0.0]]).log().requires_grad_()
    logp = torch.tensor([[0.25, 0.75, 0.0]]).log().requires_grad_()
    value = divergences.reverse_kl(logq, logp)
    of_q, of_p = torch.autograd.grad(value, (logq, logp))
    torch.testing.assert_close(of_p, torch.tensor([[-0.5, -0.5, 0.0]]))
    assert of_q.isfinite().all()
    zero = divergences.reverse_kl(logq, logp.detach())
    assert torch.equal(zero, value)
    assert torch.equal(torch.autograd.grad(zero, logq)[0], of_q)


def test_logits_read_ahead_are_those_of_the_rows_and_are_computed_a_window_at_a_time() -> None:
    asked: list[list[int]] = []
    logits = some(7, 3, seed=1)

    def compute(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return logits[rows]

    ahead = ReadAhead(compute, num_rows=7, window=4)
    for rows in ([0, 1], [1, 3], [2, 3], [4, 6], [3, 4], [6]):
        torch.testing.assert_close(ahead(torch.tensor(rows)), logits[rows], rtol=0, atol=0)
    assert asked == [[0, 1, 2, 3], [4, 5, 6], [3, 4]]


def ledger_of(loss: RowLoss, *, rows: int, vocabulary: int, chunk_tokens: int) -> Ledger:
    """What one forward and backward pass allocates."""
    hidden, head = leaves(rows=rows, vocabulary=vocabulary)
    with Ledger() as ledger:
        total, _ = head_loss(hidden, head, loss, chunk_tokens=chunk_tokens)
        total.backward()
    return ledger


@pytest.mark.parametrize("name", ["opd_sampled", "opd", "gkd_topk"])
def test_no_tensor_is_larger_than_one_chunk_of_logits_and_no_chunk_outlives_its_turn(name: str) -> None:
    vocabulary, chunk = 200, 8
    few, many = (
        ledger_of(
            loss_over(OBJECTIVES[name], rows, vocabulary),
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

    def hoarding(logits: Tensor, rows: slice) -> Both:
        hoard.append(2 * logits.detach())
        return squares(logits, rows)

    def peak(loss: RowLoss, chunk_tokens: int) -> int:
        return ledger_of(loss, rows=16, vocabulary=200, chunk_tokens=chunk_tokens).peak

    assert ledger_of(squares, rows=16, vocabulary=200, chunk_tokens=16).largest == 16 * 200
    assert peak(hoarding, 4) >= peak(squares, 4) + 3 * 4 * 200
