"""What is done for a teacher that knows nothing of potstill: read its tokens, refuse for it, check its answers.

    Reading         the teacher's tokenizer, as a local folder that the user vouches for
    ForeignScorer   refuse, ask about one item at a time, pass every answer through alignment.py
    highest         the most of something that an endpoint gives, found by asking

It refuses whatever only potstill's own teacher server has: entropies, draws and hidden states. It sends nothing itself.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from potstill.algebra.objective import Tier
from potstill.alignment import aligned
from potstill.calling.outbound import Answer, Endpoint
from potstill.errors import AlignmentError, TeacherRefused, TokenizerMismatch
from potstill.tokenization import fingerprint, load_tokenizer, render
from potstill.types import FloatArray, TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem, ScoreRequest, ScoreResponse

JSON = "application/json"
_UNVERSIONED = "unversioned"  # the revision of weights that nobody vouches for
_UNLIMITED = 2**31 - 1  # of items, tokens and bytes: every item is a request of its own
SMALL_ANSWER_BYTES = 2**20
NO_LOGPROB = -9999.0
"""What OpenAI-compatible servers write for minus infinity, and for numbers that they do not have."""

_TAIL_FLOOR = 2.0**-23  # 1 less a sum of float32 probabilities is rounding below it

Shape = TypeVar("Shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to do when this teacher is asked for more than it has."""

    ids: str
    top_k: str


class Reading:
    """How a teacher reads text: a copy of its tokenizer. Raises ConfigError when the folder holds none."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.fingerprint = fingerprint(self.tokenizer)
        self.vocabulary = len(self.tokenizer)

    def context(self, item: ScoreItem) -> list[int]:
        """Ids that the teacher reads before the completion: its own where the item has some."""
        from jinja2 import TemplateError  # comes with transformers, which a tokenizer needs

        if item.teacher_messages is not None:
            try:
                return render(self.tokenizer, item.teacher_messages)
            except TemplateError:
                raise TeacherRefused(f"item {item.id}: the chat template does not take its messages") from None
        ids = item.context_ids if item.teacher_context_ids is None else item.teacher_context_ids
        return [int(token) for token in ids]

    def ids_of(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def text_of(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


class ForeignScorer(ABC):
    """A Scorer that asks its endpoint about one item at a time. Owns the endpoint, and closes it.

    `tokenizer` is a folder with a copy of the teacher's; `revision` is whatever the user calls its weights: a run is
    resumed only with the same.
    """

    advice: ClassVar[Advice]

    def __init__(self, endpoint: Endpoint, *, model: str, revision: str | None, tokenizer: Path) -> None:
        self._endpoint = endpoint
        self._reading = Reading(tokenizer)
        self._identity = TeacherIdentity(
            name=model, revision=revision or _UNVERSIONED, tokenizer_fingerprint=self._reading.fingerprint
        )
        self._able: Capabilities | None = None

    async def capabilities(self) -> Capabilities:
        """What the endpoint gives, found by asking it once. Tier.TEXT: it scores nothing that it is given.

        Raises TokenizerMismatch when it is seen to read other tokens.
        """
        if self._able is None:
            self._able = await self._find(self._deadline())
        return self._able

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        """As Scorer. FAILED: an item whose answer is not certain. The first error ends what is still in flight."""
        if not items:
            return []
        by = self._deadline()
        able = await self.capabilities()
        request = ScoreRequest(model=able.model, items=tuple(items), ask=ask)
        _refuse_other(expect, able.identity)
        _refuse_unfit(ask, able, self.advice)
        tasks = [asyncio.create_task(self._score(item, ask=ask, able=able, by=by)) for item in items]
        try:
            found = tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        ids = tuple(item.id for item in items)
        return aligned(request, ScoreResponse(request_id="", identity=able.identity, ids=ids, scores=found), expect)

    async def aclose(self) -> None:
        await self._endpoint.aclose()

    @abstractmethod
    async def _find(self, by: float) -> Capabilities:
        """What the endpoint gives, found by asking it until the loop's time `by`."""

    @abstractmethod
    async def _score(self, item: ScoreItem, *, ask: Ask, able: Capabilities, by: float) -> TeacherScores:
        """One item; FAILED where its answer is not certain."""

    def _offers(self, tier: Tier, *, context_length: int, max_top_k: int) -> Capabilities:
        return Capabilities(
            model=self._identity.name,
            revision=self._identity.revision,
            tokenizer_fingerprint=self._identity.tokenizer_fingerprint,
            tier=tier,
            context_length=context_length - 1,  # one place is for a token that the endpoint insists on writing
            vocabulary=self._reading.vocabulary,
            max_items=_UNLIMITED,
            max_tokens=_UNLIMITED,
            max_top_k=max_top_k,
            max_body_bytes=_UNLIMITED,
            hidden_size=0,
            head_id="",
        )

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._endpoint.policy.deadline_s


def check_text(item: ScoreItem, context: Sequence[int], able: Capabilities) -> None:
    """Raise TeacherRefused for a text that the teacher cannot read, before it is sent."""
    length = len(context) + len(item.completion_ids)
    if length > able.context_length:
        raise TeacherRefused(f"item {item.id}: {length} tokens; {able.model} reads {able.context_length}")
    given = () if item.token_ids is None else (item.token_ids.max(),)
    if max(*context, item.completion_ids.max(), *given) >= able.vocabulary:
        raise TeacherRefused(f"item {item.id}: holds an id outside the {able.vocabulary} tokens of {able.model}")


def parsed(shape: TypeAdapter[Shape], answer: Answer, what: str) -> Shape:
    """A success as the shape it should have. Raises AlignmentError for another one."""
    try:
        return shape.validate_json(answer.content)
    except ValidationError:
        raise AlignmentError(f"{what} answers in another shape than it should") from None


def tail_of(logprobs: FloatArray) -> FloatArray:
    """Log of the mass [T] outside `logprobs` [T, K], as 1 less their sum: more a foreign teacher does not tell."""
    rest = 1.0 - np.exp(logprobs.astype(np.float64)).sum(axis=1)
    tail: FloatArray = np.log(np.maximum(rest, _TAIL_FLOOR)).astype(np.float32)
    return tail


def is_sound(logprobs: FloatArray) -> bool:
    """Whether all of them are numbers that a teacher computed."""
    return bool((logprobs > NO_LOGPROB).all())  # NaN is above nothing


async def highest(gives: Callable[[int], Awaitable[bool]], most: int) -> int | None:
    """The largest number up to `most` that `gives` is true of, by bisection; None when it is not even true of 0."""
    if not await gives(0):
        return None
    if await gives(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await gives(middle) else (low, middle)
    return low


def _refuse_other(expect: TeacherIdentity | None, found: TeacherIdentity) -> None:
    if expect is None or expect == found:
        return
    if expect.tokenizer_fingerprint != found.tokenizer_fingerprint:
        raise TokenizerMismatch(f"{found.name} reads other tokens than {expect.name}, which is expected")
    raise TeacherRefused(f"{found.name} {found.revision} is not {expect.name} {expect.revision}, which is expected")


def _refuse_unfit(ask: Ask, able: Capabilities, advice: Advice) -> None:
    if able.tier == Tier.TEXT:
        raise TeacherRefused(f"{able.model} writes text but scores none: choose a method that needs no scores")
    for name in ("entropy", "draws", "hidden"):
        if getattr(ask, name):
            raise TeacherRefused(f"{able.model} has no {name}: serve its weights with `potstill teacher serve`")
    if ask.num_ids and able.tier < Tier.IDS:
        raise TeacherRefused(f"{able.model} does not score ids that the caller chooses: {advice.ids}")
    for name in ("top_k", "num_ids"):
        if getattr(ask, name) > able.max_top_k:
            raise TeacherRefused(f"{name} is {getattr(ask, name)}; {able.model} gives {able.max_top_k}: {advice.top_k}")
