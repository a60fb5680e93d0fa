"""Where a text would be corrected: among disagreements only, by divergence, and nowhere when there is none."""

from __future__ import annotations

import math

import pytest
import torch

from learner.revision import positions
from potstill.errors import NonFinite

WRITTEN = torch.tensor([1, 2, 3, 4, 5, 6])
AGREES = WRITTEN
DIFFERS = WRITTEN + 1


def one_by_one(divergence: list[float], disagrees: list[bool]) -> int:
    best = -1
    for t, (value, counts) in enumerate(zip(divergence, disagrees, strict=True)):
        if counts and (best < 0 or value > divergence[best]):
            best = t
    return best


@pytest.mark.parametrize("seed", range(5))
def test_positions_are_those_of_a_loop_over_each_completion(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    divergence = torch.rand(6, generator=generator)
    disagrees = torch.rand(6, generator=generator) < 0.6
    found = positions(divergence, WRITTEN, torch.where(disagrees, DIFFERS, AGREES), (2, 3, 1)).tolist()
    parts = zip(divergence.split([2, 3, 1]), disagrees.split([2, 3, 1]), strict=True)
    assert found == [one_by_one(d.tolist(), m.tolist()) for d, m in parts]


def test_the_largest_divergence_does_not_count_where_the_teacher_agrees() -> None:
    divergence = torch.tensor([0.1, 0.3, 9.0, 0.2, 0.0, 0.0])
    best = torch.where(torch.tensor([True, True, False, True, True, True]), DIFFERS, AGREES)
    assert positions(divergence, WRITTEN, best, (6,)).tolist() == [1]


def test_a_text_that_the_teacher_would_have_written_is_left_alone() -> None:
    assert positions(torch.rand(6), WRITTEN, AGREES, (4, 2)).tolist() == [-1, -1]


def test_a_completion_without_tokens_has_no_position() -> None:
    assert positions(torch.ones(6), WRITTEN, DIFFERS, (0, 6)).tolist() == [-1, 0]


def test_a_disagreement_without_divergence_still_counts_and_of_equals_the_first() -> None:
    assert positions(torch.zeros(6), WRITTEN, DIFFERS, (3, 3)).tolist() == [0, 0]


def test_a_token_that_the_student_ruled_out_is_the_worst() -> None:
    divergence = torch.tensor([1.0, math.inf, 2.0, 0.0, 0.0, 0.0])
    assert positions(divergence, WRITTEN, DIFFERS, (6,)).tolist() == [1]


def test_a_nan_is_refused() -> None:
    with pytest.raises(NonFinite, match="NaN"):
        positions(torch.full((6,), math.nan), WRITTEN, AGREES, (6,))
