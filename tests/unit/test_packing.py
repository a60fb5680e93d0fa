"""Packed is the same as one by one, and nothing about the packing reaches the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.aggregation import Denominators
from learner.attention import Layout, packed_attention
from learner.packing import pack, plan_micro_batches, share
from learner.trainer import totals
from potstill.types import ScoredRollout
from tests.rollouts import random_batch
from tests.trainers import (
    PLAIN,
    SELF_TEACHER,
    VOCABULARY,
    loss_and_gradient,
    make_network,
    make_student,
    make_trainer,
    plain_logits,
)

LENGTHS = [(3, 4), (1, 1), (6, 2), (2, 7), (1, 3)]
METHODS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd", "objective": {"support": {"k": 3}}},
    "opd_sampled": {"method": "opd_sampled"},
    "opsd": {"method": "opsd", "teacher": SELF_TEACHER},
    "sft": {"method": "sft"},
}
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum", {"kind": "constant", "length": 6}]
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def batch_for(method: dict[str, Any]) -> list[ScoredRollout]:
    by = "others" if method["method"] == "sft" else "student"
    return random_batch(LENGTHS, vocabulary=VOCABULARY, seed=3, by=by)


def sequences(batch: list[ScoredRollout]) -> tuple[list[Any], list[Any], list[Any]]:
    rollouts = [scored.rollout for scored in batch]
    return [r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts], [r.loss_mask for r in rollouts]


def test_the_example_of_the_docstring() -> None:
    masks = [np.ones(2, bool), np.ones(3, bool)]
    packed = pack([np.array([7, 8]), np.array([9])], [np.array([1, 2]), np.array([3, 4, 5])], masks)
    assert packed.input_ids.tolist() == [7, 8, 1, 9, 3, 4]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert packed.lengths == (3, 3)
    assert packed.predicts.tolist() == [1, 2, 3, 4, 5]


def test_a_packed_forward_pass_equals_separate_plain_ones() -> None:
    """Grouped-query attention, float64; the plain side is transformers with its own attention."""
    batch = random_batch(LENGTHS, vocabulary=VOCABULARY, seed=1)
    student, plain = make_student(), make_network(attention=PLAIN)
    logits = student(pack(*sequences(batch))) @ student.head.T
    expected = [plain_logits(plain, s.rollout.prompt_ids, s.rollout.completion_ids) for s in batch]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-9, atol=1e-10)


def test_only_rows_that_predict_a_loss_token_come_out_and_each_once() -> None:
    masks = [[True, False, False, True], [False], [True, True], [False] * 7, [False, True, False]]
    batch = random_batch(LENGTHS, vocabulary=VOCABULARY, seed=1, masks=masks)
    student, plain = make_student(), make_network(attention=PLAIN)
    packed = pack(*sequences(batch))
    assert len(packed.predicts) == len(packed.predicts.unique()) == sum(map(sum, masks))
    expected = [
        plain_logits(plain, s.rollout.prompt_ids, s.rollout.completion_ids)[torch.from_numpy(s.rollout.loss_mask)]
        for s in batch
    ]
    torch.testing.assert_close(student(packed) @ student.head.T, torch.cat(expected), rtol=1e-9, atol=1e-10)


def test_no_padding_and_no_last_token_enter_the_model() -> None:
    packed = pack(*sequences(random_batch(LENGTHS, vocabulary=VOCABULARY, seed=1)))
    assert len(packed.input_ids) == len(packed.position_ids) == sum(p + t - 1 for p, t in LENGTHS)


def test_two_views_of_a_completion_agree_in_the_order_of_their_loss_tokens() -> None:
    batch = random_batch([(3, 4), (2, 3)], vocabulary=VOCABULARY, seed=2)
    prompts, completions, masks = sequences(batch)
    written = np.concatenate(completions)
    for contexts in (prompts, [scored.rollout.teacher_context_ids for scored in batch]):
        packed = pack(contexts, completions, masks)
        inner = [0, 1, 2, 4, 5]  # the last token of each completion is never an input
        assert packed.input_ids[packed.predicts[inner] + 1].tolist() == written[inner].tolist()


@pytest.mark.parametrize(("context", "completion"), [([], [1]), ([1], [])])
def test_an_empty_context_or_completion_is_refused(context: list[int], completion: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one context token and one completion token"):
        pack([np.array(context)], [np.array(completion)], [np.ones(len(completion), bool)])


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        pack([np.array([1]), np.array([2])], [np.array([1])], [np.array([True])])


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_a_plan_holds_every_sequence_once_and_no_more_tokens_than_allowed(lengths: list[int], room: int) -> None:
    plan = plan_micro_batches(lengths, max_tokens=room)
    assert sorted(index for part in plan for index in part) == list(range(len(lengths)))
    for part in plan:
        assert sum(lengths[i] for i in part) <= room or len(part) == 1


def test_a_plan_fills_the_fullest_part_that_has_room() -> None:
    assert plan_micro_batches([2, 7, 3, 5], max_tokens=10) == [[1, 2], [3, 0]]


def test_a_layout_is_the_example_of_its_docstring() -> None:
    layout = Layout.of((2, 1), torch.device("cpu"))
    assert layout.spread.tolist() == [[0, 1], [2, 2]]
    assert layout.gather.tolist() == [0, 1, 2]


def test_attention_refuses_a_sliding_window() -> None:
    states = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match="sliding window"):
        packed_attention(
            torch.nn.Identity(),
            states,
            states,
            states,
            None,
            layout=Layout.of((1,), torch.device("cpu")),
            scaling=1.0,
            sliding_window=2,
        )


@every_method
def test_the_size_of_a_micro_batch_does_not_change_the_gradient(method: dict[str, Any]) -> None:
    batch = batch_for(method)
    one, many = (
        loss_and_gradient(make_trainer(**method, learner={"micro_batch_tokens": size}), batch) for size in (1000, 9)
    )
    assert one[0] == pytest.approx(many[0], rel=1e-12)
    torch.testing.assert_close(one[1], many[1], rtol=1e-9, atol=1e-13)


@every_method
def test_the_order_of_rollouts_does_not_change_the_gradient(method: dict[str, Any]) -> None:
    batch = batch_for(method)
    shuffled = [batch[i] for i in (4, 2, 0, 3, 1)]
    one, other = (loss_and_gradient(make_trainer(**method), order) for order in (batch, shuffled))
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=1e-13)


@every_method
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
def test_two_ranks_with_the_same_denominators_add_up(method: dict[str, Any], aggregation: Any) -> None:
    batch = batch_for(method)
    trainer = make_trainer(**{**method, "objective": {**method.get("objective", {}), "aggregation": aggregation}})
    whole = loss_and_gradient(trainer, batch)
    step = totals(batch, trainer.masks(batch))
    ranks = [loss_and_gradient(trainer, part, step) for part in (batch[:2], batch[2:])]
    assert sum(loss for loss, _ in ranks) == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(ranks[0][1] + ranks[1][1], whole[1], rtol=1e-9, atol=1e-13)


def test_ranks_that_divided_by_their_own_counts_would_not_add_up() -> None:
    """The test above can fail."""
    batch = random_batch(LENGTHS, vocabulary=VOCABULARY, seed=3)
    trainer = make_trainer(**METHODS["opd"])
    whole = loss_and_gradient(trainer, batch)[1]
    own = [loss_and_gradient(trainer, part)[1] for part in (batch[:2], batch[2:])]
    assert ((own[0] + own[1]) / 2 - whole).norm() > 0.01 * whole.norm()


def test_a_rollout_without_a_loss_token_changes_nothing() -> None:
    lengths = [(3, 4), (2, 3)]
    masks = [[True, True, False, True], [False] * 3]
    batch = random_batch(lengths, vocabulary=VOCABULARY, seed=4, masks=masks)
    trainer = make_trainer(method="opd", objective={"support": {"k": 3}, "aggregation": "sequence_mean"})
    with_it, without = loss_and_gradient(trainer, batch), loss_and_gradient(trainer, batch[:1])
    assert with_it[0] == without[0]
    assert torch.equal(with_it[1], without[1])


def test_what_stands_in_a_masked_place_teaches_but_is_not_taught() -> None:
    """A tool's turn: its tokens are context for what follows, and no term of the loss is theirs."""
    masks = [[True, False, False, True]]
    batch = random_batch([(3, 4)], vocabulary=VOCABULARY, seed=5, masks=masks, by="others")
    plain = make_network(attention=PLAIN)
    rollout = batch[0].rollout
    logq = plain_logits(plain, rollout.prompt_ids, rollout.completion_ids).log_softmax(-1)
    written = [logq[t, rollout.completion_ids[t]].item() for t in (0, 3)]
    loss, _ = loss_and_gradient(make_trainer(method="sft"), batch)
    assert loss == pytest.approx(-sum(written) / 2, rel=1e-9)


def test_means_over_tokens_and_over_sequences_by_hand() -> None:
    batch = random_batch([(3, 4), (2, 1)], vocabulary=VOCABULARY, seed=6, by="others")
    plain = make_network(attention=PLAIN)
    long, short = (
        sum(
            -plain_logits(plain, s.rollout.prompt_ids, s.rollout.completion_ids).log_softmax(-1)[t, token].item()
            for t, token in enumerate(s.rollout.completion_ids)
        )
        for s in batch
    )
    by_token, by_sequence = (
        loss_and_gradient(make_trainer(method="sft", objective={"aggregation": aggregation}), batch)[0]
        for aggregation in ("token_mean", "sequence_mean")
    )
    assert by_token == pytest.approx((long + short) / 5, rel=1e-6)
    assert by_sequence == pytest.approx((long / 4 + short) / 2, rel=1e-6)


def test_a_denominator_of_part_of_the_step_is_refused() -> None:
    batch = random_batch([(3, 4), (2, 3)], vocabulary=VOCABULARY, seed=6, by="others")
    with pytest.raises(ValueError, match="are smaller than"):
        loss_and_gradient(
            make_trainer(method="sft"), batch, {"others": Denominators(num_loss_tokens=4, num_sequences=2)}
        )


@given(lengths=st.lists(st.integers(1, 50), max_size=20), num_ranks=st.integers(1, 5))
def test_ranks_share_all_sequences_and_none_has_more_than_the_longest_beyond_another(
    lengths: list[int], num_ranks: int
) -> None:
    shares = share(lengths, num_ranks=num_ranks)
    assert len(shares) == num_ranks
    assert sorted(index for indices in shares for index in indices) == list(range(len(lengths)))
    held = [sum(lengths[i] for i in indices) for indices in shares]
    assert max(held) - min(held) <= max(lengths, default=0)


def test_one_rank_has_everything_in_its_order() -> None:
    assert share([2, 9, 4], num_ranks=1) == [[0, 1, 2]]
