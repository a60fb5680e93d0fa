"""Who says what a completion is worth: the data's verifier, or a black box that puts completions in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from potstill import rankings
from potstill.environments import Environment
from potstill.teachers.black_box import together
from potstill.types import Prompt
from rollout_worker.sources import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MIDDLE = 0.5


class Judge(Protocol):
    async def rewards(self, texts: Sequence[Text]) -> list[float]:
        """One reward a text, in [0, 1]; NaN where nothing can judge it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judges:
    training: Judge
    held_out: Judge  # knows the truth


class Ranker(Protocol):
    async def order(self, prompt: Prompt, answers: Sequence[str]) -> list[int]:
        """Indices of the answers, of which no two are equal, the best first."""


class Verifier:
    """The environment's own verdict on each text."""

    def __init__(self, environment: Environment, tokenizer: PreTrainedTokenizerBase) -> None:
        self._environment = environment
        self._tokenizer = tokenizer

    async def rewards(self, texts: Sequence[Text]) -> list[float]:
        return [self._environment.score(text.prompt, plain(self._tokenizer, text)) for text in texts]


class Ranked:
    """The place of each of the student's completions among those of its prompt: 1 for the best, 0 for the worst.

    Equal completions share a place. Where all are equal, or there is only one, nothing is asked: each earns half, which
    is no more and no less than its group. Text that the student did not write takes part in no ranking; the verifier
    says what it is worth.
    """

    def __init__(self, ranker: Ranker, verifier: Verifier, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ranker = ranker
        self._verifier = verifier
        self._tokenizer = tokenizer

    async def rewards(self, texts: Sequence[Text]) -> list[float]:
        found = await self._verifier.rewards(texts)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, text in enumerate(texts):
            if (text.completion.weight_versions >= 0).any():
                groups[text.prompt.id].append(index)
        ranked = await together(self._ranked([texts[index] for index in members]) for members in groups.values())
        for members, rewards in zip(groups.values(), ranked, strict=True):
            for index, reward in zip(members, rewards, strict=True):
                found[index] = reward
        return found

    async def _ranked(self, group: Sequence[Text]) -> list[float]:
        answers = [plain(self._tokenizer, text) for text in group]
        different = list(dict.fromkeys(answers))
        if len(different) == 1:
            return [_MIDDLE] * len(group)
        order = await self._ranker.order(group[0].prompt, different)
        worth = dict(zip(different, rankings.from_ranking(order), strict=True))
        return [worth[answer] for answer in answers]


def plain(tokenizer: PreTrainedTokenizerBase, text: Text) -> str:
    decoded: str = tokenizer.decode(text.completion.token_ids.tolist(), skip_special_tokens=True)
    return decoded
