"""Interview: the small questions that a teacher which scores is asked, and the numbers that its answers make.

Every number is of findings.py, by its name. It judges none of them. What the teacher raises goes through; an item that
comes back without scores is Unscored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.algebra.objective import Tier
from potstill.errors import AlignmentError, TeacherRefused
from potstill.teachers.scorer import Scorer
from potstill.tokenization import fingerprint
from potstill.types import FloatArray, IntArray, ScoreStatus, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = (
    "A farmer has 12 hens and buys 9 more, then sells 4 of them at the market. How many hens are left? First we add: "
    "12 + 9 = 21. Then we take away the four that were sold: 21 - 4 = 17. The farmer has 17 hens.\n"
)
"""What a teacher whose tokenizer is at hand is asked about: text that any model has an opinion of."""
LEAST_CONTEXT = 8
"""Tokens that a teacher must read to be asked anything."""
_NUM_CONTEXT, _NUM_COMPLETION = 16, 32  # tokens
_NUM_IDS = 4
_REPEATS = 2  # of a request, beside the first
_NOTHING_MORE = Ask()


class Unscored(TeacherRefused):
    """The teacher answered, and had no scores for an item: it has no text for these tokens, or failed at it."""


class Interview:
    """One teacher, and the text that it is asked about: SAMPLE in its own tokens, or ids from all over its vocabulary.

    Without `tokenizer`, or with another than the teacher's, it is ids: nobody knows what they mean. Of T tokens of
    completion and those of context before it, up to 32 and 16, the teacher reads as many as it can.
    """

    def __init__(self, scorer: Scorer, able: Capabilities, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._scorer = scorer
        self._able = able
        length = min(_NUM_CONTEXT + _NUM_COMPLETION, able.context_length)
        if tokenizer is None or fingerprint(tokenizer) != able.tokenizer_fingerprint:
            ids = np.random.default_rng(0).integers(able.vocabulary, size=length).tolist()
        else:
            ids = [int(token) for token in tokenizer.encode(SAMPLE, add_special_tokens=False)][:length]
        split = min(_NUM_CONTEXT, len(ids) // 2)
        self._context, self._completion = ids[:split], ids[split:]

    # --------------------------------------------------------------------------------------------- what it gives

    async def rung(self, tier: Tier) -> None:
        """Ask for what the tier means, once. Raises when it does not come."""
        num_ids = min(_NUM_IDS, self._able.vocabulary)
        ask = {
            Tier.SAMPLED: Ask(),
            Tier.TOPK: Ask(top_k=1),
            Tier.IDS: Ask(num_ids=num_ids),
            Tier.FULL: Ask(hidden=self._able.hidden_size),
        }[tier]
        ids = np.tile(np.arange(num_ids, dtype=np.int32), (len(self._completion), 1)) if ask.num_ids else None
        await self._ask(self._item(token_ids=ids), ask=ask)

    async def gives_top_k(self, top_k: int) -> bool:
        """Whether a top-k so wide comes back. A teacher that is away raises."""
        try:
            await self._ask(self._item(completion=self._completion[:2]), ask=Ask(top_k=top_k))
        except (TeacherRefused, AlignmentError):
            return False
        return True

    async def reads(self, num_tokens: int) -> None:
        """Ask about a text of so many tokens. Raises when it is not scored."""
        ids = (self._context + self._completion) * num_tokens
        await self._ask(self._item(context=ids[: num_tokens - 1], completion=ids[num_tokens - 1 : num_tokens]))

    # -------------------------------------------------------------------------------------- what its numbers say

    async def first(self) -> tuple[FloatArray, float]:
        """[T] log-probs of the completion, and the milliseconds that they took."""
        started = time.perf_counter()
        sampled = await self._sampled(self._item())
        return sampled, 1000 * (time.perf_counter() - started)

    async def noise(self, first: FloatArray) -> float:
        return max([_gap(first, await self._sampled(self._item())) for _ in range(_REPEATS)])

    async def batch_gap(self, first: FloatArray) -> float:
        """Beside an item of as many, other, tokens, in both orders."""
        other = self._item("other", context=self._context[::-1], completion=self._completion[::-1])
        alone = await self._sampled(other)
        one, two = await self._ask(self._item(), other)
        three, four = await self._ask(other, self._item())
        pairs = ((first, one), (alone, two), (alone, three), (first, four))
        return max(_gap(expected, found.sampled) for expected, found in pairs)

    async def context_effect(self, first: FloatArray) -> float:
        """Of the same context read backwards."""
        return _gap(first, await self._sampled(self._item(context=self._context[::-1])))

    async def mass_error(self) -> float:
        """Worst token, in float64."""
        (scores,) = await self._ask(self._item(), ask=Ask(top_k=1))
        top, tail = _some(scores.topk_logprobs).astype(np.float64), _some(scores.topk_tail).astype(np.float64)
        return float(np.abs(np.exp(top).sum(axis=1) + np.exp(tail) - 1).max())

    async def greedy_gap(self) -> float:
        """Worst of a few tokens: what the teacher would have written there is given to it, and scored."""
        (scores,) = await self._ask(self._item(), ask=Ask(top_k=1))
        length = len(self._completion)
        places = sorted({0, length // 3, 2 * length // 3, length - 1})
        items = [
            self._item(f"greedy-{place}", completion=[*self._completion[:place], int(_some(scores.topk_ids)[place, 0])])
            for place in places
        ]
        given = np.array([one.sampled[-1] for one in await self._ask(*items)])
        return float(np.abs(given - _some(scores.topk_logprobs)[places, 0]).max())

    async def blankness(self, first: FloatArray, tier: Tier) -> float:
        """Mean entropy over ln V; without entropies the same of its top-1, or of the least even given token."""
        even = math.log(self._able.vocabulary)
        try:
            (scores,) = await self._ask(self._item(), ask=Ask(entropy=True))
            return float(_some(scores.entropy).mean()) / even
        except TeacherRefused:
            if tier < Tier.TOPK:
                return 1 - float(np.abs(first + even).max()) / even
        (scores,) = await self._ask(self._item(), ask=Ask(top_k=1))
        return -float(_some(scores.topk_logprobs)[:, 0].mean()) / even

    async def tokens_per_s(self, num_items: int) -> float:
        """Of so many items in one request, every token that is read counted."""
        started = time.perf_counter()
        await self._ask(*(self._item(f"item-{index}") for index in range(num_items)))
        return num_items * (len(self._context) + len(self._completion)) / (time.perf_counter() - started)

    # ---------------------------------------------------------------------------------------------------- asking

    def _item(
        self,
        name: str = "probe",
        *,
        context: Sequence[int] | None = None,
        completion: Sequence[int] | None = None,
        token_ids: IntArray | None = None,
    ) -> ScoreItem:
        return ScoreItem(
            id=name,
            context_ids=np.array(self._context if context is None else context, np.int32),
            completion_ids=np.array(self._completion if completion is None else completion, np.int32),
            token_ids=token_ids,
        )

    async def _sampled(self, item: ScoreItem) -> FloatArray:
        (scores,) = await self._ask(item)
        return scores.sampled

    async def _ask(self, *items: ScoreItem, ask: Ask = _NOTHING_MORE) -> list[TeacherScores]:
        answers = await self._scorer.score(items, ask, self._able.identity)
        for item, scores in zip(items, answers, strict=True):
            if scores.status != ScoreStatus.OK:
                raise Unscored(f"item {item.id} came back without scores, with status {scores.status}")
        return answers


def _gap(one: FloatArray, other: FloatArray) -> float:
    """Mean over tokens of the absolute difference, in nats."""
    return float(np.abs(one.astype(np.float64) - other).mean())


def _some(array: FloatArray | IntArray | None) -> NDArray[Any]:
    """An array that was asked for."""
    if array is None:
        raise AlignmentError("a score that was asked for is missing")
    return array
