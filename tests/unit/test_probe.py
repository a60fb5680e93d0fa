"""A probe against small teachers, honest ones and such that lie in one way each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from potstill.algebra.objective import Tier
from potstill.alignment import aligned
from potstill.errors import TeacherRefused, TeacherUnavailable
from potstill.probing.findings import LIMITS, Limit, refusals
from potstill.probing.interview import SAMPLE
from potstill.probing.probe import ProbeReport, preflight, probe
from potstill.tokenization import fingerprint
from potstill.types import ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem, ScoreRequest, ScoreResponse, unscored
from tests.tiny_models import tiny_tokenizer

VOCABULARY = 61
Lie = Callable[[TeacherScores], TeacherScores]


@cache
def law(prefix: tuple[int, ...]) -> np.ndarray:
    """[V] log-probs after a prefix, of which every token counts."""
    logits = 3 * np.random.default_rng(prefix).normal(size=VOCABULARY)
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def even(prefix: tuple[int, ...]) -> np.ndarray:
    return np.full(VOCABULARY, -np.log(VOCABULARY), np.float32)


class Small:
    """A whole scorer over 61 tokens: its claims, its law, what it refuses, and one lie about its answers."""

    def __init__(
        self,
        *,
        law: Callable[[tuple[int, ...]], np.ndarray] = law,
        lie: Lie = lambda scores: scores,
        checked: bool = True,
        refuses: Callable[[ScoreItem, Ask], bool] = lambda item, ask: False,
        fails: Callable[[ScoreItem], bool] = lambda item: False,
        deaf: bool = False,
        mixes: bool = False,
        fingerprint: str = "f",
        **claims: int,
    ) -> None:
        self.law, self.lie, self.checked, self.refuses, self.fails = law, lie, checked, refuses, fails
        self.deaf, self.mixes = deaf, mixes
        self.asked: list[tuple[Sequence[ScoreItem], Ask]] = []
        facts = {"tier": Tier.IDS, "context_length": 64, "vocabulary": VOCABULARY, "max_top_k": 8, "hidden_size": 0}
        limits = {"max_items": 100, "max_tokens": 10_000, "max_body_bytes": 2**20}
        self.able = Capabilities(
            model="small", revision="r", tokenizer_fingerprint=fingerprint, head_id="", **(facts | limits | claims)
        )

    async def capabilities(self) -> Capabilities:
        return self.able

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        assert expect == self.able.identity
        self.asked.append((items, ask))
        if any(self.refuses(item, ask) for item in items):
            raise TeacherRefused("it says no")
        found = [self.lie(self._honest(item, ask)) for item in items]
        if self.mixes and len({len(item.completion_ids) for item in items}) == 1:
            found.reverse()
        request = ScoreRequest(model="small", items=tuple(items), ask=ask)
        ids = tuple(item.id for item in items)
        response = ScoreResponse(request_id="", identity=self.able.identity, ids=ids, scores=tuple(found))
        return aligned(request, response, expect) if self.checked else found

    async def aclose(self) -> None:
        pass

    def _honest(self, item: ScoreItem, ask: Ask) -> TeacherScores:
        completion = item.completion_ids.tolist()
        if self.fails(item):
            return unscored(self.able.identity, ScoreStatus.FAILED, num_tokens=len(completion), ask=ask)
        text = ([] if self.deaf else item.context_ids.tolist()) + completion
        first = len(text) - len(completion)
        rows = np.stack([self.law(tuple(text[: first + place])) for place in range(len(completion))])
        top = np.argsort(-rows, axis=1, kind="stable")[:, : ask.top_k].astype(np.int32)
        ids = item.token_ids
        return TeacherScores(
            status=ScoreStatus.OK,
            identity=self.able.identity,
            sampled=_at(rows, item.completion_ids[:, None])[:, 0],
            topk_ids=top if ask.top_k else None,
            topk_logprobs=_at(rows, top) if ask.top_k else None,
            topk_tail=_outside(rows, top) if ask.top_k else None,
            ids_logprobs=None if ids is None else _at(rows, ids),
            ids_tail=None if ids is None else _outside(rows, ids),
            entropy=-(np.exp(rows) * rows).sum(axis=1) if ask.entropy else None,
            hidden=np.zeros((len(rows), ask.hidden), np.uint16) if ask.hidden else None,
        )


def _at(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(rows, ids, axis=1)


def _outside(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    left = np.exp(rows.astype(np.float64))
    np.put_along_axis(left, ids, 0.0, axis=1)
    return np.log(left.sum(axis=1)).astype(np.float32)


def no_entropy(item: ScoreItem, ask: Ask) -> bool:
    return ask.entropy


def shaken() -> Lie:
    random = np.random.default_rng(0)
    return lambda scores: replace(scores, sampled=scores.sampled - abs(random.normal(size=1)).astype(np.float32))


def tempered_top(scores: TeacherScores) -> TeacherScores:
    """Its top-k at temperature 2, and no other of its numbers."""
    if scores.topk_logprobs is None:
        return scores
    top = scores.topk_logprobs / 2 - 2
    return replace(scores, topk_logprobs=top, topk_tail=np.log1p(-np.exp(top).sum(axis=1)))


def late(scores: TeacherScores) -> TeacherScores:
    """Rows one token late, as when the leading null of a prompt's rows is read as a row."""
    moved = {name: getattr(scores, name) for name in ("sampled", "topk_ids", "topk_logprobs", "topk_tail")}
    return replace(scores, **{name: np.roll(rows, 1, axis=0) for name, rows in moved.items() if rows is not None})


def heavy(scores: TeacherScores) -> TeacherScores:
    return scores if scores.topk_tail is None else replace(scores, topk_tail=scores.topk_tail + np.float32(0.1))


# ------------------------------------------------------------------------------------------------ an honest teacher


@pytest.mark.parametrize(
    ("teacher", "tier"),
    [
        (Small(), Tier.IDS),
        (Small(hidden_size=4), Tier.FULL),
        (Small(tier=Tier.TOPK, refuses=no_entropy), Tier.TOPK),
        (Small(tier=Tier.SAMPLED, refuses=lambda item, ask: ask != Ask()), Tier.SAMPLED),
    ],
)
async def test_an_honest_teacher_passes_at_its_tier(teacher: Small, tier: Tier):
    report = await probe(teacher)
    assert (report.problems, report.notes, report.tier) == ((), (), tier)
    assert report.identity == teacher.able.identity
    assert report.context_length == 64
    assert report.max_top_k == (8 if tier >= Tier.TOPK else None)
    assert report.measured.keys() <= LIMITS.keys()
    assert (report.measured["noise"], report.measured["batch_gap"]) == (0, 0)
    assert ("greedy_gap" in report.measured) == (tier >= Tier.TOPK)
    assert report.latency_ms > 0
    assert report.tokens_per_s > 0


async def test_a_preflight_asks_for_no_more_than_is_needed_and_for_little():
    teacher = Small(hidden_size=4)
    report = await preflight(teacher, needed=Tier.SAMPLED)
    assert (report.tier, report.problems, report.tokens_per_s) == (Tier.SAMPLED, (), None)
    assert all(ask.top_k == ask.num_ids == ask.hidden == 0 for _, ask in teacher.asked)
    everything = Small(hidden_size=4)
    await preflight(everything)
    assert len(everything.asked) <= 16
    assert (
        max(len(item.context_ids) + len(item.completion_ids) for items, _ in everything.asked for item in items) <= 48
    )


async def test_with_its_tokenizer_a_teacher_is_asked_about_text_and_with_another_about_ids():
    tokenizer = tiny_tokenizer()
    reader = Small(law=even, vocabulary=300, fingerprint=fingerprint(tokenizer), refuses=lambda item, ask: True)
    await preflight(reader, tokenizer)
    (((item,), _), *_) = reader.asked
    assert SAMPLE.startswith(tokenizer.decode([*item.context_ids, *item.completion_ids]))
    stranger = Small(refuses=lambda item, ask: True)
    await preflight(stranger, tokenizer)
    (((item,), _), *_) = stranger.asked
    assert max(item.completion_ids) < VOCABULARY


# ------------------------------------------------------------------------------------------------------------- lies


@pytest.mark.parametrize(
    ("finding", "teacher"),
    [
        ("greedy_gap", Small(tier=Tier.TOPK, lie=late, checked=False)),
        ("greedy_gap", Small(lie=tempered_top, checked=False)),
        ("mass_error", Small(lie=heavy, checked=False)),
        ("noise", Small(tier=Tier.SAMPLED, refuses=no_entropy, lie=shaken())),
        ("batch_gap", Small(mixes=True)),
        ("context_effect", Small(deaf=True)),
        ("blankness", Small(law=even)),
        ("blankness", Small(law=even, refuses=no_entropy)),
        ("blankness", Small(law=even, tier=Tier.SAMPLED, refuses=no_entropy)),
    ],
)
async def test_each_lie_is_found_and_says_what_it_means(finding: str, teacher: Small):
    report = await preflight(teacher)
    assert any(problem.startswith(f"{finding} ") for problem in report.problems), report
    assert any(LIMITS[finding].refusal in problem for problem in report.problems)


async def test_answers_that_alignment_refuses_refuse_the_teacher():
    report = await preflight(Small(lie=heavy))
    assert len(report.problems) == 1
    assert "topk and its tail hold" in report.problems[0]
    assert report.measured == {}


async def test_a_refused_rung_lowers_the_tier_and_says_so():
    report = await probe(Small(refuses=lambda item, ask: ask.num_ids > 0))
    assert (report.tier, report.problems) == (Tier.TOPK, ())
    assert report.notes == ("it claims IDS and does not give it: it says no",)


async def test_a_teacher_that_refuses_even_log_probs_cannot_be_used():
    report = await probe(Small(refuses=lambda item, ask: True))
    assert report.problems == ("it claims SAMPLED and does not give it: it says no",)


async def test_the_top_k_that_really_comes_is_found():
    report = await probe(Small(max_top_k=20, refuses=lambda item, ask: ask.top_k > 5))
    assert (report.max_top_k, report.problems) == (5, ())
    assert report.notes == ("it claims a top-k of 20 and gives 5",)


async def test_a_context_that_is_refused_or_too_long_to_try_is_told():
    def too_long(item: ScoreItem, ask: Ask) -> bool:
        return len(item.context_ids) + len(item.completion_ids) > 60

    refused = await probe(Small(refuses=too_long))
    assert refused.problems == ("it claims to read 64 tokens and does not: it says no",)
    long = await probe(Small(context_length=100_000, max_tokens=100_000))
    assert (long.problems, long.context_length) == ((), None)
    assert "not tried" in long.notes[0]


async def test_a_teacher_of_text_alone_is_not_held_to_orders_that_no_text_reads_as():
    def backwards(item: ScoreItem) -> bool:
        return item.id == "other"

    report = await preflight(Small(fails=backwards))
    assert (report.tier, report.problems) == (Tier.IDS, ())
    assert "not all was tried" in report.notes[0]
    assert "batch_gap" not in report.measured


async def test_who_is_away_scores_nothing_or_reads_next_to_nothing_is_refused_with_the_reason():
    class Away(Small):
        async def capabilities(self) -> Capabilities:
            raise TeacherUnavailable("nobody is there")

    assert await probe(Away()) == ProbeReport(problems=("nobody is there",))
    assert "scores no text" in (await probe(Small(tier=Tier.TEXT))).problems[0]
    assert "reads 7 tokens" in (await probe(Small(context_length=7))).problems[0]


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_a_finding_is_refused_beyond_its_limit_and_when_it_is_no_number(name: str, limit: Limit):
    good, bad = (0.0, limit.most * 1.01) if limit.most is not None else (limit.least * 1.01, 0.0)
    assert refusals({name: good}) == []
    assert len(refusals({name: bad})) == len(refusals({name: math.nan})) == 1
