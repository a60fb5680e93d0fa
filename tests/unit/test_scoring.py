"""Scores against a slow obvious float64 version, at the edges where float32 usually goes wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.errors import AlignmentError
from teacher_server.scoring import RowScores, log_mass_outside, score_logits, score_rows

TOLERANCE = 2e-6  # float32 log-probs of size 10 against float64


def obvious(logits: list[float], target: int, ids: list[int], top_k: int, vocabulary: int) -> dict[str, object]:
    """One row in plain Python floats (64 bit): every probability written down, then looked up."""
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    best = sorted(range(vocabulary), key=lambda index: -probabilities[index])[:top_k]

    def tail(kept: list[int]) -> float:
        left = math.fsum(p for index, p in enumerate(probabilities) if index not in kept)
        return math.log(left) if left else -math.inf

    return {
        "sampled": math.log(probabilities[target]),
        "topk_ids": best,
        "topk_logprobs": [math.log(probabilities[index]) for index in best],
        "topk_tail": tail(best),
        "ids_logprobs": [math.log(probabilities[index]) for index in ids],
        "ids_tail": tail(ids),
        "entropy": -math.fsum(p * math.log(p) for p in probabilities if p),
    }


def test_every_score_equals_the_obvious_float64_version():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(9, 23, generator=generator)
    targets = torch.randint(0, 20, (9,), generator=generator)
    ids = torch.stack([torch.randperm(20, generator=generator)[:5] for _ in range(9)])
    scores = score_logits(logits, targets=targets, token_ids=ids, top_k=6, entropy=True, vocabulary=20)
    for row in range(9):
        wanted = obvious(logits[row].tolist(), int(targets[row]), ids[row].tolist(), 6, 20)
        for name, value in wanted.items():
            np.testing.assert_allclose(getattr(scores, name)[row], value, atol=TOLERANCE, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("chunk_rows", [1, 2, 7, 100])
def test_the_size_of_a_chunk_changes_nothing(chunk_rows):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(7, 4, generator=generator), torch.randn(11, 4, generator=generator)
    targets, ids = torch.arange(7), torch.arange(3).repeat(7, 1)

    def scored(chunk: int) -> RowScores:
        return score_rows(
            hidden,
            lambda rows: rows @ weight.T,
            targets=targets,
            token_ids=ids,
            top_k=2,
            entropy=True,
            vocabulary=11,
            chunk_rows=chunk,
        )

    for name in RowScores.__slots__:
        torch.testing.assert_close(getattr(scored(chunk_rows), name), getattr(scored(7), name), atol=1e-6, rtol=0)


def test_no_more_rows_than_a_chunk_ever_reach_the_head():
    seen = []

    def head(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return rows

    hidden = torch.randn(10, 5)
    score_rows(
        hidden,
        head,
        targets=torch.zeros(10, dtype=torch.long),
        token_ids=None,
        top_k=0,
        entropy=False,
        vocabulary=5,
        chunk_rows=4,
    )
    assert seen == [4, 4, 2]


def test_a_tail_far_below_float32_resolution_is_still_right():
    logits = torch.tensor([[0.0, -40.0, -41.0, -60.0]])
    tail = log_mass_outside(torch.log_softmax(logits, -1), torch.tensor([[0]]))
    wanted = math.log(math.exp(-40) + math.exp(-41) + math.exp(-60))
    assert float(tail) == pytest.approx(wanted, abs=1e-5)


def test_the_tail_of_the_whole_vocabulary_is_minus_infinity():
    logits = torch.randn(2, 4)
    scores = score_logits(logits, targets=torch.zeros(2).long(), token_ids=None, top_k=4, entropy=False, vocabulary=4)
    assert (scores.topk_tail == -math.inf).all()


def test_padding_rows_of_the_head_are_never_in_a_top_k_but_keep_their_mass():
    logits = torch.tensor([[0.0, 1.0, 9.0]])  # id 2 is padding, and the most probable
    scores = score_logits(logits, targets=torch.tensor([0]), token_ids=None, top_k=2, entropy=False, vocabulary=2)
    assert scores.topk_ids.tolist() == [[1, 0]]
    assert float(scores.topk_tail) == pytest.approx(float(torch.log_softmax(logits, -1)[0, 2]), abs=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(3, 50).to(torch.bfloat16)
    scores = score_logits(logits, targets=torch.arange(3), token_ids=None, top_k=0, entropy=False, vocabulary=50)
    wanted = torch.log_softmax(logits.double(), -1)[torch.arange(3), torch.arange(3)]
    torch.testing.assert_close(scores.sampled.double(), wanted, atol=TOLERANCE, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "token_ids", "message"),
    [
        ([0, 5], [[0, 1], [1, 2]], "targets holds an id outside"),
        ([0, -1], [[0, 1], [1, 2]], "targets holds an id outside"),
        ([0], [[0, 1], [1, 2]], "targets has 1 rows"),
        ([0, 1], [[0, 1]], "token_ids has 1 rows"),
        ([0, 1], [[0, 1], [1, 5]], "token_ids holds an id outside"),
        ([0, 1], [[0, 1], [3, 3]], "token_ids repeats an id"),
    ],
)
def test_ids_that_cannot_be_scored_raise(targets, token_ids, message):
    with pytest.raises(AlignmentError, match=message):
        score_rows(
            torch.randn(2, 6),
            lambda rows: rows,
            targets=torch.tensor(targets),
            token_ids=torch.tensor(token_ids),
            top_k=0,
            entropy=False,
            vocabulary=5,
            chunk_rows=8,
        )
