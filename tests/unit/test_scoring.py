"""Scores against a slow obvious float64 version, at the edges where float32 usually goes wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from potstill.errors import AlignmentError
from potstill.wire import Ask
from teacher_server.scoring import RowScores, draw, log_mass_outside, score_rows, top

TOLERANCE = 2e-6  # float32 log-probs of size 10 against float64


def score(logits: torch.Tensor, *, ask: Ask = Ask(), **given: Any) -> RowScores:  # noqa: B008
    """Score rows whose logits are given: the states are the logits, and the head is the identity."""
    rows, width = logits.shape
    arguments: dict[str, Any] = {
        "targets": torch.zeros(rows, dtype=torch.long),
        "token_ids": None,
        "uniforms": None,
        "vocabulary": width,
        "chunk_rows": 1024,
    }
    return score_rows(logits, torch.eye(width, dtype=logits.dtype), ask=ask, **arguments | given)


def outside(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return log_mass_outside(logprobs.clone(), ids, spare=torch.empty_like(logprobs))


def drawn(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    return draw(logprobs, uniforms, spare=torch.empty_like(logprobs))


def obvious(logits: list[float], target: int, ids: list[int], top_k: int, vocabulary: int) -> dict[str, object]:
    """One row in plain Python floats (64 bit): every probability written down, then looked up."""
    highest = max(logits)
    weights = [math.exp(value - highest) for value in logits]
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
    ask = Ask(top_k=6, num_ids=5, entropy=True)
    scores = score(logits, targets=targets, token_ids=ids, ask=ask, vocabulary=20)
    for row in range(9):
        wanted = obvious(logits[row].tolist(), int(targets[row]), ids[row].tolist(), 6, 20)
        for name, value in wanted.items():
            np.testing.assert_allclose(getattr(scores, name)[row], value, atol=TOLERANCE, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("chunk_rows", [1, 2, 7, 100])
def test_the_size_of_a_chunk_changes_nothing(chunk_rows):
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(7, 4, generator=generator), torch.randn(150, 4, generator=generator)
    uniforms = torch.rand(7, 6, dtype=torch.float64, generator=generator)

    def scored(chunk: int) -> RowScores:
        return score_rows(
            hidden,
            head,
            targets=torch.arange(7),
            token_ids=torch.arange(3).repeat(7, 1),
            ask=Ask(top_k=2, num_ids=3, draws=6, entropy=True, hidden=4),
            uniforms=uniforms,
            vocabulary=141,
            chunk_rows=chunk,
        )

    for name in RowScores.__slots__:
        torch.testing.assert_close(getattr(scored(chunk_rows), name), getattr(scored(7), name), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("width", "k"), [(5, 5), (31, 1), (300, 3), (4096, 7), (4099, 64), (10_007, 20)])
def test_the_top_of_a_row_is_that_of_a_full_sort(width, k):
    generator = torch.Generator().manual_seed(width)
    values = torch.stack([torch.randperm(width, generator=generator) for _ in range(6)]).float()
    ordered = values.sort(dim=-1, descending=True)
    found, columns = top(values, k)
    assert torch.equal(found, ordered.values[:, :k])
    assert torch.equal(columns, ordered.indices[:, :k])


def test_the_top_of_equal_values_holds_distinct_columns():
    values = torch.zeros(2, 4096)
    found, columns = top(values, 64)
    assert (found == 0).all()
    assert [len(set(row)) for row in columns.tolist()] == [64, 64]


def test_a_tail_far_below_float32_resolution_is_still_right():
    logits = torch.tensor([[0.0, -40.0, -41.0, -60.0], [0.0, -200.0, -201.0, -300.0]])
    tail = outside(torch.log_softmax(logits, -1), torch.tensor([[0], [0]]))
    wanted = [math.log(math.exp(-40) + math.exp(-41) + math.exp(-60)), -200 + math.log(1 + math.exp(-1))]
    assert tail.tolist() == pytest.approx(wanted, abs=3e-5)


def test_the_tail_of_the_whole_vocabulary_is_minus_infinity():
    assert (score(torch.randn(2, 4), ask=Ask(top_k=4)).topk_tail == -math.inf).all()


def test_padding_rows_of_the_head_are_never_in_a_top_k_and_never_drawn_but_keep_their_mass():
    logits = torch.tensor([[0.0, 1.0, 9.0]])  # id 2 is padding, and the most probable
    uniforms = torch.linspace(0, 0.999, 50, dtype=torch.float64)[None]
    scores = score(logits, ask=Ask(top_k=1, draws=50), uniforms=uniforms, vocabulary=2)
    left = torch.log_softmax(logits, -1)[0, [0, 2]].logsumexp(0)
    assert (scores.topk_ids.tolist(), set(scores.drawn_ids.flatten().tolist())) == ([[1]], {0})
    assert float(scores.topk_tail) == pytest.approx(float(left), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_whatever_the_precision_of_the_head(dtype):
    hidden, head = (3 * torch.randn(3, 8)).to(dtype), torch.randn(9000, 8).to(dtype)
    targets = torch.arange(3)
    arguments = {"token_ids": None, "uniforms": None, "ask": Ask(), "vocabulary": 9000, "chunk_rows": 2}
    scores = score_rows(hidden, head, targets=targets, **arguments)
    wanted = (hidden.double() @ head.double().T).log_softmax(-1)[targets, targets]
    torch.testing.assert_close(scores.sampled.double(), wanted, atol=1e-5, rtol=1e-6)


def test_states_are_rounded_to_the_nearest_bfloat16_ties_to_even():
    states = torch.tensor([[1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 0.3]])
    rounded = score(states, ask=Ask(hidden=4)).hidden
    assert rounded.dtype == torch.bfloat16
    assert rounded.tolist() == [[1.0, 1.0, 1.0 + 2**-6, 0.30078125]]


# --------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("width", [3, 63, 64, 65, 1000])
def test_draws_invert_the_distribution_function(width):
    logprobs = 3 * torch.randn(4, width, generator=torch.Generator().manual_seed(width))
    logprobs[:, ::3] = -torch.inf
    uniforms = torch.rand(4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = drawn(logprobs, uniforms)
    cumulative = np.cumsum(np.exp(logprobs.double().numpy()), axis=1)
    for row in range(4):
        shares = cumulative[row] / cumulative[row, -1]
        below = np.concatenate([[0.0], shares[:-1]])
        for column, u in zip(found[row].tolist(), uniforms[row].tolist(), strict=True):
            assert below[column] - 1e-6 <= u <= shares[column] + 1e-6
            assert logprobs[row, column] > -torch.inf


def test_draws_outside_a_top_k_have_the_teachers_renormalised_frequencies():
    logits = torch.randn(1, 70, generator=torch.Generator().manual_seed(5))
    uniforms = (torch.arange(100_000, dtype=torch.float64)[None] + 0.5) / 100_000
    scores = score(logits, ask=Ask(top_k=3, draws=100_000), uniforms=uniforms)
    wanted = logits.double().softmax(-1)[0]
    wanted[scores.topk_ids[0]] = 0.0
    counts = torch.bincount(scores.drawn_ids[0], minlength=70)
    torch.testing.assert_close(counts / 100_000, wanted / wanted.sum(), atol=2e-5, rtol=0, check_dtype=False)
    torch.testing.assert_close(scores.drawn_logprobs, logits.log_softmax(-1).gather(-1, scores.drawn_ids))


def test_the_ends_of_the_unit_interval_never_draw_what_has_no_mass():
    logprobs = torch.full((1, 200), -torch.inf)
    logprobs[0, [7, 130]] = 0.0
    uniforms = torch.tensor([[0.0, math.nextafter(0.5, 0), 0.5, math.nextafter(1.0, 0)]], dtype=torch.float64)
    assert drawn(logprobs, uniforms).tolist() == [[7, 7, 130, 130]]


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("targets", "token_ids", "message"),
    [
        ([0, 5], [[0, 1], [1, 2]], "targets holds an id outside"),
        ([0, -1], [[0, 1], [1, 2]], "targets holds an id outside"),
        ([0], [[0, 1], [1, 2]], "targets has 1 rows"),
        ([0, 1], [[0, 1]], "token_ids has 1 rows"),
        ([0, 1], [[0, 1], [1, 5]], "token_ids holds an id outside"),
        ([0, 1], [[0, 1], [3, 3]], "token_ids repeats an id"),
        ([0, 1], [[0], [3]], "token_ids has shape"),
    ],
)
def test_ids_that_cannot_be_scored_raise(targets, token_ids, message):
    given = {"targets": torch.tensor(targets), "token_ids": torch.tensor(token_ids)}
    with pytest.raises(AlignmentError, match=message):
        score(torch.randn(2, 6), ask=Ask(num_ids=2), vocabulary=5, **given)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Ask(top_k=6), "top_k is 6"),
        (Ask(hidden=5), "hidden is 5"),
        (Ask(draws=2), "uniforms has shape None"),
        (Ask(num_ids=2), "token_ids has shape None"),
    ],
)
def test_what_does_not_fit_the_rows_raises(ask, message):
    with pytest.raises(AlignmentError, match=message):
        score(torch.randn(2, 6), ask=ask, vocabulary=5)


def test_a_top_k_that_leaves_nothing_to_draw_from_raises():
    with pytest.raises(AlignmentError, match="some for the draws"):
        score(torch.randn(2, 5), ask=Ask(top_k=5, draws=1), uniforms=torch.zeros(2, 1, dtype=torch.float64))
