"""A scorer of other tokens as one that reads the student's: whom it expects, what it refuses, what it says it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from potstill.algebra.objective import Tier
from potstill.errors import AlignmentError, TeacherRefused, TokenizerMismatch
from potstill.teachers.retokenised import RetokenisedScorer
from potstill.tokenization import fingerprint
from potstill.types import Message, TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem
from tests.rollouts import make_scores
from tests.teacher_tables import offering
from tests.two_tokenizers import byte_level, pieces

STUDENT, TEACHER = byte_level(262), pieces()
THEIRS = TeacherIdentity(name="other", revision="r1", tokenizer_fingerprint=fingerprint(TEACHER))
SEEN = replace(THEIRS, tokenizer_fingerprint=fingerprint(STUDENT))
QUESTION = (Message(role="user", content="12 + 9?"),)


class Inner:
    """Scores every token −1, as `identity`, and remembers what it was asked."""

    def __init__(self, identity: TeacherIdentity = THEIRS) -> None:
        self.identity = identity
        self.asked: list[tuple[Sequence[ScoreItem], TeacherIdentity | None]] = []
        self.closed = False

    async def capabilities(self) -> Capabilities:
        return offering(self.identity, tier=Tier.FULL, hidden_size=32, head_id="h")

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        self.asked.append((items, expect))
        return [
            replace(make_scores(sampled=[-1.0] * len(item.completion_ids)), identity=self.identity) for item in items
        ]

    async def aclose(self) -> None:
        self.closed = True


def scorer_of(inner: Inner) -> RetokenisedScorer:
    return RetokenisedScorer(inner, student=STUDENT, teacher=TEACHER)


def make_item(*, messages: Any = QUESTION, item_id: str = "a") -> ScoreItem:
    ids = [*STUDENT.encode("12 + 9 = 21", add_special_tokens=False), STUDENT.eos_token_id]
    return ScoreItem(
        id=item_id,
        context_ids=np.array([1, 2], np.int32),
        completion_ids=np.array(ids, np.int32),
        domain="d",
        messages=messages,
    )


async def test_it_offers_what_crosses_tokenizers_under_the_students_tokenizer():
    able = await scorer_of(Inner()).capabilities()
    assert able.identity == SEEN
    assert (able.tier, able.hidden_size, able.head_id) == (Tier.TOPK, 0, "")


async def test_a_teacher_of_yet_other_tokens_is_refused():
    with pytest.raises(TokenizerMismatch, match=r"other tokens than those of teacher\.tokenizer"):
        await scorer_of(Inner(replace(THEIRS, tokenizer_fingerprint="f"))).capabilities()


@pytest.mark.parametrize(("expect", "passed_on"), [(SEEN, THEIRS), (None, None)])
async def test_whom_the_run_expects_is_expected_under_the_teachers_own_tokenizer(expect: Any, passed_on: Any):
    inner = Inner()
    (scores,) = await scorer_of(inner).score([make_item()], Ask(), expect)
    ((items, asked_as),) = inner.asked
    assert asked_as == passed_on
    assert (items[0].id, items[0].domain) == ("a", "d")
    assert TEACHER.decode(items[0].completion_ids.tolist()).startswith("12 + 9 = 21")
    assert scores.identity == SEEN
    assert scores.chunks is not None
    assert len(scores.sampled) == len(make_item().completion_ids)


async def test_an_identity_of_another_student_is_not_believed():
    inner = Inner()
    with pytest.raises(TokenizerMismatch, match="than this run's student"):
        await scorer_of(inner).score([make_item()], Ask(), THEIRS)
    assert inner.asked == []


@pytest.mark.parametrize("ask", [Ask(num_ids=2), Ask(entropy=True), Ask(draws=1), Ask(hidden=32)])
async def test_what_is_of_one_vocabulary_is_refused_before_it_is_asked(ask: Ask):
    inner = Inner()
    with pytest.raises(TeacherRefused, match="log-probs of text and its own top-k"):
        await scorer_of(inner).score([make_item()], ask, SEEN)
    assert inner.asked == []


async def test_an_item_without_messages_is_an_error_that_names_it():
    inner = Inner()
    with pytest.raises(AlignmentError, match=r"item b: .* reads messages, and there are none"):
        await scorer_of(inner).score([make_item(), make_item(item_id="b", messages=None)], Ask(), SEEN)
    assert inner.asked == []


async def test_it_closes_what_it_owns():
    inner = Inner()
    await scorer_of(inner).aclose()
    assert inner.closed
