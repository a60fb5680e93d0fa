"""What a teacher with another tokenizer is asked, and what its answer means for the student's tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from potstill.byte_alignment import byte_vocabulary
from potstill.errors import AlignmentError
from potstill.teachers.retokenised import Retokeniser, masked
from potstill.tokenization import render
from potstill.types import Message, Rollout, ScoreStatus, TeacherScores
from potstill.wire import ScoreItem
from tests.rollouts import make_rollout, make_scores
from tests.two_tokenizers import byte_level, pieces

SMALL, LARGE, PIECES = byte_level(262), byte_level(700), pieces()
QUESTION = (Message(role="user", content="12 + 9?"),)
PAIRS = [(one, other) for one, other in product((SMALL, LARGE, PIECES), repeat=2)]
AWKWARD = [
    "",
    " ",
    "  the sum",
    "\ufeff12",
    "\r\n",
    "日本語",
    "👩‍🚀🇯🇵",
    "é",
    "e\u0301",
    "number</s><|im_end|>",
    "ﬁ\u00a0x",
]
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=4)), min_size=1, max_size=5).map("".join)


def written(tokenizer: PreTrainedTokenizerFast, text: str, *, end: bool = True, **changes: Any) -> Rollout:
    """A rollout whose completion is the text as the tokenizer would write it."""
    ids = tokenizer.encode(text, add_special_tokens=False) + ([tokenizer.eos_token_id] if end else [])
    return make_rollout(completion=ids, **changes)


def request(between: Retokeniser, rollout: Rollout, messages: tuple[Message, ...] = QUESTION) -> ScoreItem:
    return between.request(
        ScoreItem(
            id=rollout.id,
            context_ids=rollout.prompt_ids,
            completion_ids=rollout.completion_ids,
            messages=messages,
        )
    )


def back(between: Retokeniser, rollout: Rollout, scores: TeacherScores) -> tuple[Rollout, TeacherScores]:
    return masked(rollout, between.scores(rollout.completion_ids, scores))


def asked(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, rollout: Rollout) -> list[int]:
    return request(Retokeniser(student=student, teacher=teacher), rollout).completion_ids.tolist()


def answered(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, rollout: Rollout
) -> tuple[Rollout, TeacherScores, np.ndarray]:
    """The rollout and its scores after an answer of −1, −2, … for the teacher's tokens, and that answer."""
    between = Retokeniser(student=student, teacher=teacher)
    item = request(between, rollout, QUESTION)
    sampled = -np.arange(1.0, 1 + len(item.completion_ids))
    return *back(between, rollout, make_scores(sampled=sampled)), sampled


def test_the_teacher_reads_the_conversation_in_its_own_template_and_the_text_in_its_own_tokens() -> None:
    rollout = written(SMALL, "the sum is 21")
    item = request(Retokeniser(student=SMALL, teacher=PIECES), rollout, QUESTION)
    assert item.id == rollout.id
    assert item.context_ids.tolist() == render(PIECES, QUESTION)
    assert item.context_ids.dtype == item.completion_ids.dtype == np.int32
    assert PIECES.decode(item.completion_ids.tolist()) == "the sum is 21</s>"


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize("text", ["another number", " is  the\r\n", "é 👩‍🚀 日本語", "\ufeff21"])
def test_what_the_teacher_reads_is_what_the_student_wrote(student: Any, teacher: Any, text: str) -> None:
    rollout = written(student, text)
    ids = asked(student, teacher, rollout)
    assert ids[-1] == teacher.eos_token_id
    expected = student.decode(rollout.completion_ids.tolist(), skip_special_tokens=True)
    assert teacher.decode(ids[:-1], clean_up_tokenization_spaces=False) == expected


@settings(deadline=None)
@given(texts)
def test_the_log_probs_of_all_chunks_add_up_to_those_of_the_teachers_tokens(text: str) -> None:
    """With byte-level tokenizers on both sides, whatever the text; a tokenizer and itself are one to one."""
    for student, teacher in ((SMALL, LARGE), (LARGE, SMALL), (SMALL, SMALL)):
        rollout = written(student, text)
        found, scores, sampled = answered(student, teacher, rollout)
        assert scores.chunks is not None
        groups = scores.chunks[found.loss_mask]
        per_chunk = dict(zip(groups, scores.sampled[found.loss_mask], strict=True))
        if found.loss_mask.all():  # no chunk was too long
            assert sum(per_chunk.values()) == pytest.approx(sampled.sum(), rel=1e-6)
        assert found.loss_mask[-1]
        if student is teacher and "<|im_end|>" not in text:  # which encode() takes for the end token
            assert groups.tolist() == list(range(len(rollout.completion_ids)))
            np.testing.assert_allclose(scores.sampled, sampled)


@settings(deadline=None)
@given(texts)
def test_every_text_is_read_to_its_end_token_by_pieces_too(text: str) -> None:
    """But for one that spells "▁", which is a space to them."""
    found, _, _ = answered(SMALL, PIECES, written(SMALL, text))
    assert found.loss_mask[-1] == ("▁" not in text)


def test_a_character_that_was_cut_is_masked_and_never_replaced() -> None:
    ids = SMALL.encode("is 👩", add_special_tokens=False)[:-1]
    assert SMALL.convert_ids_to_tokens(ids) == ["i", "s", "Ġ", "ð", "Ł", "ĳ"]
    rollout = make_rollout(completion=ids)
    assert "\ufffd" in SMALL.decode(ids)
    assert LARGE.decode(asked(SMALL, LARGE, rollout)) == "is "
    found, scores, _ = answered(SMALL, LARGE, rollout)
    assert found.loss_mask.tolist() == [True] * 3 + [False] * 3
    assert np.isnan(scores.sampled).tolist() == [False] * 3 + [True] * 3


def test_from_bytes_that_are_no_text_on_nothing_is_asked_not_even_the_end() -> None:
    byte = {known: token for token, known in enumerate(byte_vocabulary(SMALL).tokens) if known}
    rollout = make_rollout(completion=[byte[b"a"], byte[b"\xf0"], byte[b"\xff"], byte[b"b"], SMALL.eos_token_id])
    assert LARGE.decode(asked(SMALL, LARGE, rollout)) == "a"
    assert answered(SMALL, LARGE, rollout)[0].loss_mask.tolist() == [True, False, False, False, False]


def test_a_token_that_holds_a_good_character_and_half_of_one_is_masked() -> None:
    ids = LARGE.encode("is 👩", add_special_tokens=False)[:-1]
    assert LARGE.convert_ids_to_tokens(ids) == ["is", "ĠðŁ", "ĳ"]
    rollout = make_rollout(completion=ids)
    assert SMALL.decode(asked(LARGE, SMALL, rollout)) == "is"
    assert answered(LARGE, SMALL, rollout)[0].loss_mask.tolist() == [True, False, False]


def test_a_special_token_in_the_middle_is_left_out_and_masked() -> None:
    start = SMALL.convert_tokens_to_ids("<|im_start|>")
    around = [SMALL.encode(text, add_special_tokens=False) for text in ("the sum", " is 21")]
    rollout = make_rollout(completion=[*around[0], start, *around[1], SMALL.eos_token_id])
    assert LARGE.decode(asked(SMALL, LARGE, rollout)) == "the sum is 21<|im_end|>"
    mask = answered(SMALL, LARGE, rollout)[0].loss_mask
    assert mask.tolist() == [True] * len(around[0]) + [False] + [True] * (len(around[1]) + 1)


def test_the_name_of_a_special_token_written_as_text_stays_text() -> None:
    rollout = written(PIECES, "a<|im_end|>b")
    assert SMALL.eos_token_id not in asked(PIECES, SMALL, rollout)[:-1]
    assert PIECES.convert_ids_to_tokens(int(rollout.completion_ids[0])) == "▁"  # which is not of the text
    assert answered(PIECES, SMALL, rollout)[0].loss_mask.tolist() == [False] + [True] * (len(rollout.loss_mask) - 1)


def test_a_text_that_the_teacher_would_normalise_is_scored_as_it_was_written() -> None:
    text = "e\u0301"
    assert LARGE.decode(LARGE.encode(text, add_special_tokens=False)) != text
    ids = asked(PIECES, LARGE, written(PIECES, text))
    assert b"".join(byte_vocabulary(LARGE).written(ids)) == text.encode()


def test_where_nothing_can_be_asked_the_teacher_reads_an_end_token_and_all_is_masked() -> None:
    start = SMALL.convert_tokens_to_ids("<|im_start|>")
    unspeakable = written(SMALL, "a▁b")  # to pieces, "▁" is a space
    for rollout, teacher in ((make_rollout(completion=[start]), LARGE), (unspeakable, PIECES)):
        assert asked(SMALL, teacher, rollout)[-1] == teacher.eos_token_id
        found, scores, _ = answered(SMALL, teacher, rollout)
        assert not found.loss_mask.any()
        assert scores.chunks is not None
        assert (scores.chunks == -1).all()


def test_a_completion_of_an_end_token_alone_is_scored() -> None:
    found, scores, _ = answered(SMALL, PIECES, make_rollout(completion=[SMALL.eos_token_id]))
    assert (found.loss_mask.tolist(), scores.sampled.tolist()) == ([True], [-1.0])


def test_a_chunk_that_is_partly_of_others_is_masked_whole() -> None:
    rollout = written(SMALL, "number 21")
    free = answered(SMALL, LARGE, rollout)
    assert free[1].chunks is not None
    first = free[1].chunks == free[1].chunks[0]
    assert first.sum() > 1, "the chunk has several of the student's tokens"
    mask = np.ones(len(first), dtype=np.bool_)
    mask[0] = False
    found, scores, _ = answered(SMALL, LARGE, dataclasses.replace(rollout, loss_mask=mask))
    assert found.loss_mask.tolist() == (~first).tolist()
    assert np.isnan(scores.sampled).tolist() == first.tolist()


@pytest.mark.parametrize("status", [ScoreStatus.FAILED, ScoreStatus.DEADLINE])
def test_an_item_that_failed_stays_one_and_masks_nothing(status: int) -> None:
    rollout = written(SMALL, "the sum is 21")
    between = Retokeniser(student=SMALL, teacher=LARGE)
    num_tokens = len(request(between, rollout, QUESTION).completion_ids)
    found, scores = back(between, rollout, make_scores(sampled=[math.nan] * num_tokens, status=status))
    assert found.loss_mask.all()
    assert scores.status == status
    assert np.isnan(scores.sampled).all()
    assert len(scores.sampled) == len(rollout.completion_ids)


def test_a_score_that_is_missing_stays_a_loss_token_to_be_counted() -> None:
    rollout = written(SMALL, "the sum is 21")
    between = Retokeniser(student=SMALL, teacher=LARGE)
    sampled = np.full(len(request(between, rollout, QUESTION).completion_ids), -1.0)
    sampled[-1] = math.nan
    found, scores = back(between, rollout, make_scores(sampled=sampled))
    assert found.loss_mask.all()
    assert np.isnan(scores.sampled).tolist() == [False] * (len(found.loss_mask) - 1) + [True]


def test_scores_of_another_length_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"1 scores of a teacher that reads \d+ tokens"):
        back(Retokeniser(student=SMALL, teacher=LARGE), written(SMALL, "the sum"), make_scores(sampled=[-1.0]))


# The teacher's own top-k.


def with_topk(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, rollout: Rollout, candidates: Sequence[str]
) -> TeacherScores:
    """The scores after an answer whose top-k is, everywhere, the token that it reads (0.5), then these (0.25, …)."""
    between = Retokeniser(student=student, teacher=teacher)
    ids = request(between, rollout, QUESTION).completion_ids
    others = teacher.convert_tokens_to_ids(list(candidates))
    topk = np.array([[token, *others] for token in ids.tolist()], dtype=np.int32)
    probs = np.tile(0.5 ** np.arange(1, 2 + len(candidates)), (len(ids), 1))
    return back(
        between,
        rollout,
        make_scores(
            sampled=np.full(len(ids), math.log(0.5)),
            topk_ids=topk,
            topk_logprobs=np.log(probs),
            topk_tail=np.log(1 - probs.sum(axis=1)),
        ),
    )[1]


def test_the_top_k_is_there_where_one_token_is_one_on_both_sides_and_nowhere_else() -> None:
    rollout = written(SMALL, "number 21")
    scores = with_topk(SMALL, LARGE, rollout, [])
    assert scores.topk_ids is not None
    assert scores.topk_logprobs is not None
    assert scores.chunks is not None
    alone = np.bincount(scores.chunks)[scores.chunks] == 1
    assert 0 < alone.sum() < len(alone)
    there = (scores.topk_ids >= 0).any(axis=1)
    assert not (there & ~alone).any()
    assert there.sum() >= 2
    assert (scores.topk_ids[there, 0] == rollout.completion_ids[there]).all()
    assert np.isnan(scores.topk_logprobs).any(axis=1).tolist() == (~there).tolist()


def test_candidates_are_matched_by_their_bytes_whatever_the_family() -> None:
    rollout = written(SMALL, "a2")
    scores = with_topk(SMALL, PIECES, rollout, ["▁other", "▁", "<s>"])
    assert scores.topk_ids is not None
    assert scores.topk_tail is not None
    place = SMALL.convert_ids_to_tokens(rollout.completion_ids).index("2")
    two, space = SMALL.convert_tokens_to_ids(["2", "Ġ"])
    assert scores.topk_ids[place].tolist() == [two, -1, space, -1]
    assert math.exp(scores.topk_tail[place]) == pytest.approx(1 / 16 + 1 / 4 + 1 / 16, rel=1e-5)


def test_where_only_one_side_removes_a_leading_space_candidates_are_not_compared() -> None:
    rollout = written(LARGE, "other")
    scores = with_topk(LARGE, PIECES, rollout, [])
    assert LARGE.convert_ids_to_tokens(int(rollout.completion_ids[0])) == "other"
    assert PIECES.convert_ids_to_tokens(asked(LARGE, PIECES, rollout)) == ["▁other", "</s>"]
    assert scores.chunks is not None
    assert scores.chunks.tolist() == [0, 1]
    assert scores.topk_ids is not None
    assert scores.topk_ids.tolist() == [[-1], [LARGE.eos_token_id]]
