"""Answers that the student begins and a teacher ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from potstill.config import SamplingConfig
from potstill.types import FinishReason, Prompt
from rollout_worker.engine import Completion, GenerationRequest
from rollout_worker.sources import Engine, HandOff, Text, foreign

STOP, OWN_PROMPT, TEACHERS_PROMPT = 2, [5, 6], [5, 6, 7, 8]
MAX_NEW = 20


class Counting:
    """Writes 100, 101, … for `length` tokens, the last of them a stop token if it says so, within what is asked."""

    version = 3

    def __init__(self, *, length: int, first: int, stops: bool) -> None:
        self._length, self._first, self._stops = length, first, stops
        self.requests: list[GenerationRequest] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, *, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        assert (want_logprobs, support_k) == (False, 0)
        self.requests += requests
        return [self._one(request.max_new_tokens or sampling.max_new_tokens) for request in requests]

    def _one(self, limit: int) -> Completion:
        ids = [*range(self._first, self._first + self._length - self._stops), *[STOP] * self._stops]
        return foreign(ids[:limit], end=STOP)


def prompts(number: int) -> list[Prompt]:
    return [
        Prompt(id=f"train-{i}", index=i, messages=(), domain="d", answer=None, solution=None) for i in range(number)
    ]


def engine_of(engine: Counting, view: list[int], *, samples: int = 1) -> Engine:
    return Engine(
        engine=engine,  # type: ignore[arg-type]
        view=lambda prompt: np.array(view, np.int32),
        sampling=SamplingConfig(max_new_tokens=MAX_NEW),
        samples=samples,
        seed=0,
        is_student=False,
    )


async def handed_off(
    student: Counting, teacher: Counting, *, after: float = 0.5, number: int = 30, samples: int = 2
) -> list[Text]:
    source = HandOff(
        student=engine_of(student, OWN_PROMPT, samples=samples),
        teacher=engine_of(teacher, TEACHERS_PROMPT),
        after=after,
        end=STOP,
    )
    return await source.write(prompts(number))


async def test_the_students_tokens_stay_as_they_are_up_to_a_random_cut_and_the_teacher_goes_on() -> None:
    student = Counting(length=10, first=100, stops=True)
    teacher = Counting(length=4, first=200, stops=True)
    texts = await handed_off(student, teacher)
    cuts = []
    for text, request in zip(texts, teacher.requests, strict=True):
        ids = text.completion.token_ids.tolist()
        cut = len(ids) - 4
        assert ids == [*range(100, 100 + cut), 200, 201, 202, STOP]
        assert request.prompt_ids.tolist() == [*TEACHERS_PROMPT, *range(100, 100 + cut)]
        assert request.max_new_tokens == MAX_NEW - cut
        assert text.completion.finish_reason is FinishReason.STOP
        cuts.append(cut)
    assert set(cuts) == {5, 6, 7, 8, 9}  # beyond half, and never the whole
    assert [(text.prompt.id, text.sample) for text in texts[:3]] == [("train-0", 0), ("train-0", 1), ("train-1", 0)]
    assert len({request.seed for request in teacher.requests}) == len(texts)
    assert {r.seed for r in student.requests}.isdisjoint(r.seed for r in teacher.requests)


async def test_nobody_has_sampled_the_whole() -> None:
    texts = await handed_off(
        Counting(length=6, first=100, stops=False), Counting(length=50, first=200, stops=False), number=3
    )
    for text in texts:
        assert len(text.completion.token_ids) == MAX_NEW
        assert text.completion.finish_reason is FinishReason.LENGTH
        assert set(text.completion.weight_versions.tolist()) == {-1}
        assert np.isnan(text.completion.logprobs).all()


@pytest.mark.parametrize("length", [1, 2])
async def test_of_a_short_answer_too_the_teacher_writes_the_end(length: int) -> None:
    teacher = Counting(length=3, first=200, stops=True)
    texts = await handed_off(Counting(length=length, first=100, stops=True), teacher, after=0.99, number=4)
    assert all(text.completion.token_ids.tolist()[-3:] == [200, 201, STOP] for text in texts)
    assert {len(request.prompt_ids) - len(TEACHERS_PROMPT) for request in teacher.requests} == {length - 1}
