"""A student's text with one token of its teacher's in it, where the two differ most; the student writes on (SCRG).

    write ──► the teacher reads ──► position ──► its best token there ──► the student writes the rest anew

After the correction of Multi-Granularity Semantic Revision (arXiv 2407.10068), once a text: five gained 0.1 more there.
A text that the teacher would have written itself, token by token, stays as it is, and so does one that it failed to
score. It judges no text: only how far apart two distributions are says where the token goes.

Of KL(p‖q), p the teacher and q the student, what is known without all logits of both is that of coarser outcomes: each
of the student's most probable tokens, and everything else as one. Two distributions are never further apart seen
coarsely, so it is a lower bound (data processing), and exact where p/q is the same for all of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import NonFinite
from potstill.types import FinishReason, FloatArray, IntArray, Prompt, ScoreStatus, TeacherScores
from potstill.wire import Ask, ScoreItem
from rollout_worker.engine import Completion, GenerationRequest
from rollout_worker.scoring import Scoring
from rollout_worker.sources import Engine, Text, digest
from rollout_worker.views import Views

_LEAST = 1e-6  # mass of a rest that float32 log-probs can tell from none


@dataclass(frozen=True, slots=True, kw_only=True)
class Revised:
    """The teacher's token in a text stands at the version whose distribution it was put in for, without a log-prob:
    nobody sampled it, and nobody would know its ratio. The support and the draws at its place are still the student's.

    teacher  reads each text as the student wrote it
    width    of the student's most probable tokens, which the divergence is over
    end      the stop token
    """

    student: Engine
    teacher: Scoring
    views: Views
    width: int
    end: int

    async def write(self, prompts: Sequence[Prompt]) -> list[Text]:
        """As Source. Raises TeacherError for a teacher that is away, NonFinite for log-probs that are no numbers."""
        texts = await replace(self.student, support_k=max(self.width, self.student.support_k)).write(prompts)
        items = [self._item(text) for text in texts]
        answers = await self.teacher.read(items, Ask(top_k=1, num_ids=self.width))
        revised = [self._revised(text, scores) for text, scores in zip(texts, answers, strict=True)]
        return await self._written_on(revised)

    def _item(self, text: Text) -> ScoreItem:
        prompt = text.prompt
        return ScoreItem(
            id=f"{prompt.id}/{text.sample}/first",
            context_ids=self.views.own(prompt),
            completion_ids=text.completion.token_ids,
            teacher_context_ids=self.views.privileged(prompt),
            token_ids=_known(text.completion.support_ids)[:, : self.width],
            domain=prompt.domain,
            messages=self.views.messages(prompt),
        )

    def _revised(self, text: Text, scores: TeacherScores) -> tuple[Text, bool]:
        """The text up to the teacher's token, or all of it; and whether the student may write on."""
        completion, place = _narrow(text.completion, self.student.support_k), None
        if scores.status == ScoreStatus.OK:
            known = _known(text.completion.support_logprobs)[:, : self.width]
            apart = divergence(_known(scores.ids_logprobs), _known(scores.ids_tail), known)
            best = _known(scores.topk_ids)[:, 0]
            place = position(apart, completion.token_ids, best)
        if place is None:
            return replace(text, completion=completion), False
        corrected = _corrected(completion, place, int(best[place]), end=self.end)
        goes_on = corrected.finish_reason is FinishReason.LENGTH and place + 1 < self.student.sampling.max_new_tokens
        return replace(text, completion=corrected), goes_on

    async def _written_on(self, revised: Sequence[tuple[Text, bool]]) -> list[Text]:
        begun = [text for text, goes_on in revised if goes_on]
        endings = iter(
            await self.student.engine.generate(
                [self._request(text) for text in begun],
                self.student.sampling,
                want_logprobs=True,
                support_k=self.student.support_k,
            )
        )
        return [
            replace(text, completion=_joined(text.completion, next(endings))) if goes_on else text
            for text, goes_on in revised
        ]

    def _request(self, text: Text) -> GenerationRequest:
        kept, name = text.completion.token_ids, f"{text.prompt.id}/{text.sample}"
        return GenerationRequest(
            id=name,
            prompt_ids=np.concatenate([self.student.view(text.prompt), kept]),
            seed=digest(f"{self.student.seed}/{name}/revision") >> 1,
            max_new_tokens=self.student.sampling.max_new_tokens - len(kept),
        )


def divergence(teacher: FloatArray, rest: FloatArray, student: FloatArray) -> NDArray[np.float64]:
    """[T] nats, ≥ 0: KL(p‖q) of the outcomes "each of these K ids" and "any other", at most the KL of all tokens.

    teacher  [T, K] log p of the ids
    rest     [T] log of the teacher's mass outside them
    student  [T, K] log q of the same ids, whose mass outside them is what is left to 1

    >>> divergence(np.log([[0.5]]), np.log([0.5]), np.log([[0.9]])).round(4).tolist()  # ½ log(5/9) + ½ log 5
    [0.5108]
    """
    q_rest = np.maximum(1 - np.exp(student, dtype=np.float64).sum(axis=1), _LEAST)
    logp = np.column_stack([teacher, rest]).astype(np.float64)
    logq = np.column_stack([student, np.log(q_rest)]).astype(np.float64)
    p = np.exp(logp)
    terms = p * np.subtract(logp, logq, where=p != 0, out=np.zeros_like(p))
    apart: NDArray[np.float64] = np.maximum(terms.sum(axis=1), 0.0)  # rounding
    return apart


def position(apart: NDArray[np.floating[Any]], token_ids: IntArray, best: IntArray) -> int | None:
    """The first place of the largest divergence among those whose token is not the teacher's first choice.

    apart      [T] nats, ≥ 0, perhaps infinite
    token_ids  [T] the written tokens
    best       [T] the teacher's most probable token there

    None where the teacher would have written every token itself, which the paper leaves open. Raises NonFinite for a
    NaN.

    >>> position(np.array([9.0, 1.0, 2.0]), np.array([4, 4, 4]), np.array([4, 0, 0]))
    2
    """
    if np.isnan(apart).any():
        raise NonFinite("a divergence is NaN: no position of its completion is known to be the worst")
    differs = token_ids != best
    return int(np.where(differs, apart, -math.inf).argmax()) if differs.any() else None


def _corrected(completion: Completion, place: int, token: int, *, end: int) -> Completion:
    """Up to `place`, where `token` stands now."""
    kept = slice(place + 1)
    columns: dict[str, Any] = {name: rows if rows is None else rows[kept].copy() for name, rows in _columns(completion)}
    columns["token_ids"][place] = token
    columns["logprobs"][place] = math.nan
    reason = FinishReason.STOP if token == end else FinishReason.LENGTH
    return replace(completion, **columns, finish_reason=reason)


def _joined(begun: Completion, ending: Completion) -> Completion:
    """One after the other."""
    ends = dict(_columns(ending))
    columns: dict[str, Any] = {
        name: None if rows is None else np.concatenate([rows, ends[name]]) for name, rows in _columns(begun)
    }
    return replace(ending, **columns)


def _narrow(completion: Completion, width: int) -> Completion:
    """With that many entries of the student's top-k, most probable first; 0: without any."""
    if width == 0:
        return replace(completion, support_ids=None, support_logprobs=None)
    ids, logprobs = _known(completion.support_ids), _known(completion.support_logprobs)
    return replace(completion, support_ids=ids[:, :width].copy(), support_logprobs=logprobs[:, :width].copy())


def _known(column: NDArray[Any] | None) -> NDArray[Any]:
    assert column is not None, "asked of the engine or of the teacher"
    return column


def _columns(completion: Completion) -> list[tuple[str, Any]]:
    """Everything of a completion that has a row a token."""
    return [(f.name, getattr(completion, f.name)) for f in fields(completion) if f.name != "finish_reason"]
