"""Weights by hand, and the same weights however the step is split."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from learner.aggregation import Aggregation, Denominators, token_weights

every_aggregation = pytest.mark.parametrize("aggregation", get_args(Aggregation))


def weights(lengths: list[int], *, tokens: int, sequences: int, aggregation: Aggregation) -> list[float]:
    denominators = Denominators(num_loss_tokens=tokens, num_sequences=sequences)
    return token_weights(lengths, aggregation=aggregation, denominators=denominators).tolist()


def test_token_mean_weighs_every_token_of_the_step_the_same() -> None:
    found = weights([1, 3], tokens=8, sequences=3, aggregation="token_mean")
    assert found == [1 / 8] * 4


def test_sequence_mean_weighs_every_sequence_of_the_step_the_same() -> None:
    found = weights([1, 4], tokens=8, sequences=2, aggregation="sequence_mean")
    assert found == [1 / 2] + [1 / 8] * 4


def test_a_sequence_without_loss_tokens_has_no_weight_and_takes_none() -> None:
    assert weights([0, 2], tokens=2, sequences=1, aggregation="sequence_mean") == [1 / 2, 1 / 2]
    assert weights([0], tokens=2, sequences=1, aggregation="token_mean") == []


@every_aggregation
def test_weights_of_a_whole_step_sum_to_one(aggregation: Aggregation) -> None:
    found = weights([3, 1, 0, 7, 2], tokens=13, sequences=4, aggregation=aggregation)
    assert sum(found) == pytest.approx(1, rel=1e-6)


@every_aggregation
def test_a_split_of_the_step_does_not_change_a_weight(aggregation: Aggregation) -> None:
    step: dict[str, Any] = {"tokens": 13, "sequences": 4, "aggregation": aggregation}
    assert weights([3, 1, 0], **step) + weights([7, 2], **step) == weights([3, 1, 0, 7, 2], **step)


@every_aggregation
@pytest.mark.parametrize(("tokens", "sequences"), [(4, 2), (5, 1)])
def test_denominators_smaller_than_the_part_are_refused(aggregation: Aggregation, tokens: int, sequences: int) -> None:
    with pytest.raises(ValueError, match="are smaller than the 5 tokens of 2 sequences"):
        weights([2, 3], tokens=tokens, sequences=sequences, aggregation=aggregation)


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (0, 1), (3, 0), (3, 4), (-1, -1)])
def test_denominators_that_no_step_can_have_are_refused(tokens: int, sequences: int) -> None:
    with pytest.raises(ValueError, match="no step can be divided by"):
        Denominators(num_loss_tokens=tokens, num_sequences=sequences)


def test_weights_are_float32() -> None:
    denominators = Denominators(num_loss_tokens=3, num_sequences=1)
    assert token_weights([3], aggregation="token_mean", denominators=denominators).dtype == torch.float32
