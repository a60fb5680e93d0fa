"""Scores that were paid for are not asked for again, and never pass for another teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from potstill.teachers.cache import ScoreCache
from potstill.teachers.cached import CachedScorer
from potstill.types import Message, ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem
from tests.builders_teacher import IDENTITY, failed_scores, item, sound_scores

OTHER = replace(IDENTITY, revision="r2")


class Counting:
    """Answers soundly, with other numbers every time, and counts what it was asked; items named "bad" fail."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def capabilities(self) -> Capabilities:
        raise AssertionError("nobody asks")

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        self.asked += [one.id for one in items]
        return [
            failed_scores(one) if one.id == "bad" else sound_scores(one, ask=ask, seed=len(self.asked)) for one in items
        ]

    async def aclose(self) -> None:
        self.asked.append("closed")


def make(max_bytes: int = 2**20) -> tuple[Counting, CachedScorer]:
    scorer = Counting()
    return scorer, CachedScorer(scorer, ScoreCache(max_bytes))


async def test_what_was_scored_is_not_asked_for_again_and_order_is_kept():
    scorer, cached = make()
    a, b, c = item("a"), item("b", completion=(5,)), item("c", context=(9,))
    first = await cached.score([a, b], Ask(top_k=2), IDENTITY)
    again = await cached.score([c, replace(b, id="x"), a], Ask(top_k=2), IDENTITY)
    assert scorer.asked == ["a", "b", "c"]
    np.testing.assert_array_equal(again[1].sampled, first[1].sampled)
    np.testing.assert_array_equal(again[2].topk_ids, first[0].topk_ids)


@pytest.mark.parametrize(
    ("changed", "ask", "expect"),
    [
        (item("a"), Ask(top_k=3), IDENTITY),
        (item("a"), Ask(top_k=2), OTHER),
        (item("a", completion=(3, 4, 6)), Ask(top_k=2), IDENTITY),
        (item("a", teacher_context=(7,)), Ask(top_k=2), IDENTITY),
        (item("a", context=(), messages=(Message(role="user", content="?"),)), Ask(top_k=2), IDENTITY),
        (replace(item("a"), messages=(Message(role="user", content="?"),)), Ask(top_k=2), IDENTITY),
        (replace(item("a"), domain="maths"), Ask(top_k=2), IDENTITY),
        (item("a"), Ask(top_k=2, draws=3), IDENTITY),
        (item("a"), Ask(top_k=2), None),
    ],
)
async def test_whatever_could_change_the_answer_is_asked_for(changed: ScoreItem, ask: Ask, expect: TeacherIdentity):
    scorer, cached = make()
    await cached.score([item("a")], Ask(top_k=2), IDENTITY)
    await cached.score([changed], ask, expect)
    assert len(scorer.asked) == 2


async def test_draws_are_never_kept():
    scorer, cached = make()
    for _ in range(2):
        await cached.score([item("a")], Ask(draws=2), IDENTITY)
    assert len(scorer.asked) == 2


async def test_a_failure_is_passed_on_and_asked_for_again():
    scorer, cached = make()
    for _ in range(2):
        (scores,) = await cached.score([item("bad")], Ask(), IDENTITY)
        assert scores.status == ScoreStatus.FAILED
    assert scorer.asked == ["bad", "bad"]


async def test_two_equal_items_of_one_request_both_get_their_scores():
    _, cached = make()
    one, two = await cached.score([item("a"), item("b")], Ask(), IDENTITY)
    np.testing.assert_array_equal(one.sampled, two.sampled)


async def test_closing_closes_the_scorer():
    scorer, cached = make()
    await cached.aclose()
    assert scorer.asked == ["closed"]
