"""A token of the teacher's in the student's text: where it goes, how far apart two models are, who writes the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from potstill.config import SamplingConfig
from potstill.config_teachers import NoTeacher
from potstill.errors import NonFinite
from potstill.methods.method import objective
from potstill.types import FinishReason, Message, Prompt
from potstill.wire import Ask, ScoreItem
from rollout_worker.engine import Completion, GenerationRequest
from rollout_worker.revision import Revised, divergence, position
from rollout_worker.scoring import Scoring
from rollout_worker.sources import Engine, Text
from rollout_worker.views import Views
from tests.builders_teacher import IDENTITY, failed_scores
from tests.rollouts import make_scores
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
VOCABULARY, WIDTH, MAX_NEW = 40, 3, 6
FULL = objective(support="full", loss="forward_kl")
DIFFERS = 30  # what the teacher would write; the student never does

Distributions = NDArray[np.float64]


def distributions(rows: int, seed: int) -> Distributions:
    """[rows, VOCABULARY] log-probs."""
    logits = 2 * np.random.default_rng(seed).standard_normal((rows, VOCABULARY))
    found: Distributions = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return found


def coarse(p: Distributions, q: Distributions, width: int) -> NDArray[np.float64]:
    """As a rollout worker would find it: over the student's top `width`, float32 as everything that travels."""
    ids = np.argsort(-q, axis=1)[:, :width]
    known = np.take_along_axis(p, ids, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.log(np.maximum(1 - np.exp(known).sum(axis=1), 0)).astype(np.float32)
    return divergence(known.astype(np.float32), rest, np.take_along_axis(q, ids, axis=1).astype(np.float32))


# ------------------------------------------------------------------------------------------------- how far apart


def test_a_coarser_view_is_no_further_apart_and_that_of_every_token_is_the_kl():
    p, q = distributions(50, 0), distributions(50, 1)
    whole = (np.exp(p) * (p - q)).sum(axis=1)
    found = {width: coarse(p, q, width) for width in (1, 8, VOCABULARY)}
    assert (found[1] <= found[8] + 1e-5).all()
    assert (found[8] < whole).all()
    assert found[VOCABULARY] == pytest.approx(whole, abs=1e-4)
    assert np.corrcoef(found[8], whole)[0, 1] > 0.5


def test_equal_models_are_not_apart_and_what_only_the_teacher_writes_is():
    p = distributions(20, 0)
    assert coarse(p, p, 4) == pytest.approx(np.zeros(20), abs=1e-6)
    sure = np.full((1, 4), -math.inf, np.float32)  # nothing of what the student would write
    assert divergence(sure, np.zeros(1, np.float32), np.log(np.full((1, 4), 0.25, np.float32)))[0] > 10


def test_a_token_that_the_student_ruled_out_is_infinitely_far():
    half = np.log(np.array([[0.5, 0.5]], np.float32))
    ruled_out = np.array([[0.0, -math.inf]], np.float32)
    assert divergence(half, np.array([-math.inf], np.float32), ruled_out).tolist() == [math.inf]


# ------------------------------------------------------------------------------------------------------- where

WRITTEN = np.array([1, 2, 3, 4], np.int32)


@pytest.mark.parametrize("seed", range(5))
def test_the_position_is_that_of_a_loop_over_the_completion(seed: int):
    random = np.random.default_rng(seed)
    apart, differs = random.random(4), random.random(4) < 0.6
    wanted = None
    for t in range(4):
        if differs[t] and (wanted is None or apart[t] > apart[wanted]):
            wanted = t
    assert position(apart, WRITTEN, WRITTEN + differs) == wanted


@pytest.mark.parametrize(
    ("apart", "differs", "wanted"),
    [
        ([0.1, 0.3, 9.0, 0.2], [1, 1, 0, 1], 1),  # where the teacher agrees the largest does not count
        ([0.1, 0.3, 9.0, 0.2], [0, 0, 0, 0], None),  # a text that the teacher would have written
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 1, 1], 1),  # a disagreement without divergence counts; of equals the first
        ([1.0, math.inf, 2.0, 0.0], [1, 1, 1, 1], 1),
    ],
)
def test_only_disagreements_are_candidates(apart: list[float], differs: list[int], wanted: int | None):
    assert position(np.array(apart), WRITTEN, WRITTEN + np.array(differs)) == wanted


def test_a_nan_is_refused():
    with pytest.raises(NonFinite, match="NaN"):
        position(np.array([0.0, math.nan, 0.0, 0.0]), WRITTEN, WRITTEN)


# --------------------------------------------------------------------------------------------------- the source


class Counting:
    """Writes 1, 2, 3, … the first time and 11, 12, … from then on, `length` tokens or what it may; never the end."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.version = 0
        self.calls: list[Sequence[GenerationRequest]] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, *, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        assert want_logprobs
        self.calls.append(requests)
        self.version += 1
        return [self._one(request.max_new_tokens or sampling.max_new_tokens, support_k) for request in requests]

    def _one(self, limit: int, support_k: int) -> Completion:
        length = min(self._length, limit)
        ids = np.arange(1, length + 1, dtype=np.int32) + 10 * (len(self.calls) - 1)
        support = np.arange(support_k, dtype=np.int32) + 20
        return Completion(
            token_ids=ids,
            logprobs=np.full(length, -0.5, np.float32),
            support_ids=np.tile(support, (length, 1)) if support_k else None,
            support_logprobs=np.full((length, support_k), math.log(0.3), np.float32) if support_k else None,
            weight_versions=np.full(length, self.version, np.int32),
            finish_reason=FinishReason.LENGTH,
            draw_ids=np.tile(ids[:, None], (1, 2)),
            draw_logprobs=np.full((length, 2), -0.5, np.float32),
        )


class Pointing:
    """A teacher that would write as the student does but for `best` at `place`, where alone they are apart."""

    def __init__(self, place: int | None, *, best: int = DIFFERS, failing: str = "") -> None:
        self._place, self._best, self._failing = place, best, failing
        self.asked: list[tuple[ScoreItem, Ask, Any]] = []

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: Any) -> list[Any]:
        self.asked += [(item, ask, expect) for item in items]
        return [self._one(item) for item in items]

    def _one(self, item: ScoreItem) -> Any:
        if item.id.startswith(self._failing or "nobody"):
            return failed_scores(item)
        assert item.token_ids is not None
        best = item.completion_ids.copy()
        ids = np.full(item.token_ids.shape, math.log(0.3))
        if self._place is not None:
            best[self._place] = self._best
            ids[self._place] = math.log(0.01)
        tail = np.log1p(-np.exp(ids).sum(axis=1))
        return make_scores(sampled=[-1.0] * len(best), topk_ids=best[:, None], ids_logprobs=ids, ids_tail=tail)


def prompts(number: int) -> list[Prompt]:
    question = (Message(role="user", content="1 + 2 = ?"),)
    return [
        Prompt(id=f"train-{i}", index=i, messages=question, domain="d", answer=None, solution=None)
        for i in range(number)
    ]


async def revised(student: Counting, teacher: Pointing, *, support_k: int = 0, number: int = 1) -> list[Text]:
    views = Views(TOKENIZER, NoTeacher())
    own = Engine(
        engine=student,  # type: ignore[arg-type]
        view=views.own,
        sampling=SamplingConfig(max_new_tokens=MAX_NEW),
        samples=1,
        seed=0,
        is_student=True,
        support_k=support_k,
    )
    reads = Scoring(teacher, IDENTITY, FULL, hidden_size=8)  # type: ignore[arg-type]
    source = Revised(student=own, teacher=reads, views=views, width=WIDTH, end=END)
    return await source.write(prompts(number))


async def test_the_prefix_stays_as_it_is_and_the_student_writes_on_from_the_teachers_token():
    student, teacher = Counting(length=4), Pointing(place=1)
    (text,) = await revised(student, teacher)
    found = text.completion
    assert found.token_ids.tolist() == [1, DIFFERS, 11, 12, 13, 14]
    assert found.weight_versions.tolist() == [1, 1, 2, 2, 2, 2]
    assert np.isnan(found.logprobs).tolist() == [False, True, False, False, False, False]
    assert found.draw_ids is not None
    assert found.draw_ids[:, 0].tolist() == [1, 2, 11, 12, 13, 14]  # at the teacher's token, what the student drew
    assert found.finish_reason is FinishReason.LENGTH
    first, second = (call[0] for call in student.calls)
    assert second.prompt_ids.tolist() == [*first.prompt_ids.tolist(), 1, DIFFERS]
    assert second.max_new_tokens == MAX_NEW - 2
    assert second.seed != first.seed


async def test_the_teacher_is_asked_for_its_best_and_for_what_the_student_would_write():
    teacher = Pointing(place=None)
    await revised(Counting(length=2), teacher)
    ((item, ask, expect),) = teacher.asked
    assert (ask, expect) == (Ask(top_k=1, num_ids=WIDTH), IDENTITY)
    assert item.token_ids is not None
    assert item.token_ids.tolist() == [[20, 21, 22]] * 2
    assert item.completion_ids.tolist() == [1, 2]


@pytest.mark.parametrize("support_k", [0, 2, 5])
async def test_the_text_keeps_as_much_of_the_students_top_as_the_objective_reads(support_k: int):
    for place in (None, 1):
        (text,) = await revised(Counting(length=3), Pointing(place=place), support_k=support_k)
        found = text.completion
        width = None if found.support_ids is None else found.support_ids.shape
        assert width == ((len(found.token_ids), support_k) if support_k else None)
        assert (found.support_logprobs is None) == (support_k == 0)


async def test_a_text_that_the_teacher_would_have_written_or_failed_to_score_stays():
    student = Counting(length=4)
    texts = await revised(student, Pointing(place=2, failing="train-1"), number=3)
    assert [DIFFERS in text.completion.token_ids for text in texts] == [True, False, True]
    assert texts[1].completion.token_ids.tolist() == [1, 2, 3, 4]
    assert not np.isnan(texts[1].completion.logprobs).any()
    (text,) = await revised(student, Pointing(place=None))
    assert not np.isnan(text.completion.logprobs).any()


async def test_a_teacher_that_ends_the_text_has_the_last_word():
    student = Counting(length=4)
    (text,) = await revised(student, Pointing(place=1, best=END))
    assert text.completion.token_ids.tolist() == [1, END]
    assert text.completion.finish_reason is FinishReason.STOP
    assert [len(call) for call in student.calls] == [1, 0]


async def test_nothing_is_written_beyond_the_limit():
    student = Counting(length=MAX_NEW)
    (text,) = await revised(student, Pointing(place=MAX_NEW - 1))
    assert text.completion.token_ids.tolist() == [1, 2, 3, 4, 5, DIFFERS]
    assert text.completion.finish_reason is FinishReason.LENGTH
