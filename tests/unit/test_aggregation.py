"""Weights by hand, by the formula over a padded batch, and the same however the step is split."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner import aggregation as module
from learner.aggregation import Denominators, budget_keep, token_weights
from potstill.algebra.aggregations import Aggregation, Constant, SequenceMean, SequenceSum, TokenBudget, TokenMean

KINDS: tuple[Aggregation, ...] = (
    TokenMean(),
    SequenceMean(),
    SequenceSum(),
    Constant(length=16),
    TokenBudget(tokens=64),
)
every_aggregation = pytest.mark.parametrize("aggregation", KINDS, ids=lambda kind: str(kind.kind))
some_lengths = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)


def of_step(lengths: list[int]) -> Denominators:
    return Denominators(num_loss_tokens=sum(lengths), num_sequences=sum(length > 0 for length in lengths))


def weights(lengths: list[int], *, tokens: int, sequences: int, aggregation: Aggregation) -> list[float]:
    denominators = Denominators(num_loss_tokens=tokens, num_sequences=sequences)
    found: list[float] = token_weights(lengths, aggregation=aggregation, denominators=denominators).tolist()
    return found


def over_padded_batch(losses: Tensor, mask: Tensor, aggregation: Aggregation) -> float:
    """The formula of each aggregation, sequence by sequence, over losses and mask [B, T]."""
    sums = [float(row[kept].sum()) for row, kept in zip(losses, mask, strict=True) if bool(kept.any())]
    counts = [int(kept.sum()) for kept in mask if bool(kept.any())]
    match aggregation:
        case TokenMean():
            return sum(sums) / sum(counts)
        case SequenceMean():
            return sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)
        case SequenceSum():
            return sum(sums) / len(sums)
        case Constant(length=length):
            return sum(sums) / (len(sums) * length)
        case TokenBudget(tokens=tokens):
            return sum(sums) / tokens


def test_token_mean_weighs_every_token_of_the_step_the_same() -> None:
    assert weights([1, 3], tokens=8, sequences=3, aggregation=TokenMean()) == [1 / 8] * 4


def test_sequence_mean_weighs_every_sequence_of_the_step_the_same() -> None:
    assert weights([1, 4], tokens=8, sequences=2, aggregation=SequenceMean()) == [1 / 2] + [1 / 8] * 4


def test_sequence_sum_divides_by_sequences_only() -> None:
    assert weights([1, 4], tokens=8, sequences=4, aggregation=SequenceSum()) == [1 / 4] * 5


def test_constant_lets_no_length_change_another_weight() -> None:
    short = weights([1, 1], tokens=8, sequences=4, aggregation=Constant(length=10))
    long = weights([1, 5], tokens=8, sequences=4, aggregation=Constant(length=10))
    assert short == [1 / 40] * 2
    assert long == [1 / 40] * 6


def test_a_sequence_without_loss_tokens_has_no_weight_and_takes_none() -> None:
    assert weights([0, 2], tokens=2, sequences=1, aggregation=SequenceMean()) == [1 / 2, 1 / 2]
    assert weights([0], tokens=2, sequences=1, aggregation=TokenMean()) == []


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), TokenBudget(tokens=13)])
def test_weights_of_a_whole_step_sum_to_one(aggregation: Aggregation) -> None:
    found = weights([3, 1, 0, 7, 2], tokens=13, sequences=4, aggregation=aggregation)
    assert sum(found) == pytest.approx(1, rel=1e-14)


@every_aggregation
@settings(deadline=None)
@given(lengths=some_lengths, width=st.integers(7, 20), seed=st.integers(0, 99))
def test_it_is_the_formula_over_masks_with_holes_whatever_the_padding(
    aggregation: Aggregation, lengths: list[int], width: int, seed: int
) -> None:
    dice = torch.Generator().manual_seed(seed)
    losses = torch.full((len(lengths), width), torch.nan, dtype=torch.float64)
    mask = torch.zeros_like(losses, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, torch.randperm(width, generator=dice)[:length]] = True
    losses[mask] = torch.randn(sum(lengths), generator=dice, dtype=torch.float64)
    found = token_weights(mask.sum(-1).tolist(), aggregation=aggregation, denominators=of_step(lengths)) @ losses[mask]
    assert float(found) == pytest.approx(over_padded_batch(losses, mask, aggregation), abs=1e-12)


@every_aggregation
@settings(deadline=None)
@given(lengths=some_lengths, parts=st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_a_split_over_micro_batches_and_ranks_changes_no_weight(
    aggregation: Aggregation, lengths: list[int], parts: list[int]
) -> None:
    def weights_of(indices: list[int]) -> list[Tensor]:
        here = [lengths[index] for index in indices]
        found = token_weights(here, aggregation=aggregation, denominators=of_step(lengths))
        return list(found.split(here))

    whole = weights_of(list(range(len(lengths))))
    for part in range(4):
        indices = [index for index in range(len(lengths)) if parts[index] == part]
        for index, alone in zip(indices, weights_of(indices), strict=True):
            assert torch.equal(alone, whole[index])


@every_aggregation
@pytest.mark.parametrize(("tokens", "sequences"), [(4, 2), (5, 1)])
def test_denominators_smaller_than_the_part_are_refused(aggregation: Aggregation, tokens: int, sequences: int) -> None:
    with pytest.raises(ValueError, match="are smaller than the 5 tokens of 2 sequences"):
        weights([2, 3], tokens=tokens, sequences=sequences, aggregation=aggregation)


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (0, 1), (3, 0), (3, 4), (-1, -1)])
def test_denominators_that_no_step_can_have_are_refused(tokens: int, sequences: int) -> None:
    with pytest.raises(ValueError, match="no step can be divided by"):
        Denominators(num_loss_tokens=tokens, num_sequences=sequences)


@every_aggregation
def test_weights_are_float64_also_when_there_are_none(aggregation: Aggregation) -> None:
    for lengths in ([3], []):
        found = token_weights(lengths, aggregation=aggregation, denominators=of_step([3]))
        assert (found.dtype, len(found)) == (torch.float64, sum(lengths))


@settings(deadline=None)
@given(lengths=some_lengths, tokens=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_a_budget_keeps_whole_completions_until_it_is_full_and_cuts_one(
    lengths: list[int], tokens: int, seed: int
) -> None:
    kept = budget_keep(lengths, tokens=tokens, seed=seed)
    assert sum(kept) == min(tokens, sum(lengths))
    assert sum(0 < here < length for here, length in zip(kept, lengths, strict=True)) <= 1
    assert all(here <= length for here, length in zip(kept, lengths, strict=True))


@settings(deadline=None)
@given(lengths=some_lengths, tokens=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_a_budget_is_the_same_under_the_same_seed(lengths: list[int], tokens: int, seed: int) -> None:
    assert budget_keep(lengths, tokens=tokens, seed=seed) == budget_keep(lengths, tokens=tokens, seed=seed)


def test_a_budget_favours_no_place_in_the_step() -> None:
    whole = [budget_keep([5] * 4, tokens=10, seed=seed) for seed in range(400)]
    for place in range(4):
        assert 150 < sum(kept[place] == 5 for kept in whole) < 250


def test_a_budget_divides_by_itself_also_when_the_step_has_fewer_tokens() -> None:
    kept = list(budget_keep([3, 2], tokens=10, seed=0))
    found = token_weights(kept, aggregation=TokenBudget(tokens=10), denominators=of_step(kept))
    assert found.tolist() == [1 / 10] * 5


def test_more_tokens_than_the_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens exceed the budget of 4; cut them with budget_keep"):
        weights([2, 3], tokens=5, sequences=2, aggregation=TokenBudget(tokens=4))


def test_the_examples_in_the_docstrings_are_true() -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
