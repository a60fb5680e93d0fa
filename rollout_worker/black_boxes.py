"""What a black box does in a run: it answers prompts, puts answers in order, or advises a teacher that reads more.

Its text is somebody else's: it is decoded, cut and compared, never executed, and never shown to the student's prompt.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from potstill.errors import TeacherRefused
from potstill.teachers.black_box import BlackBox
from potstill.teachers.cache import Paid
from potstill.types import FinishReason, Message, Prompt
from rollout_worker.engine import Completion
from rollout_worker.sources import Text, foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answers:
    """A source: the black box's own answer to each prompt, as tokens of the student; a cut one has no end."""

    def __init__(self, box: BlackBox, tokenizer: PreTrainedTokenizerBase) -> None:
        self._box = box
        self._tokenizer = tokenizer

    async def write(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Raises TeacherRefused for a text without tokens, of which nothing could be learnt."""
        answers = await self._box.answers(prompts)
        return [
            Text(prompt=prompt, sample=0, completion=self._completion(prompt, answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _completion(self, prompt: Prompt, answer: Paid) -> Completion:
        # the name of a special token in somebody's text is text, and ends no turn
        ids = self._tokenizer.encode(answer.text, add_special_tokens=False, split_special_tokens=True)
        if not ids:
            raise TeacherRefused(f"the teacher's answer to prompt {prompt.id} is no token of the student's")
        end = self._tokenizer.eos_token_id
        return foreign([*ids, end] if answer.finish_reason == FinishReason.STOP else ids, end=end)


class Advised:
    """Prompts with what the black box says about them, for a teacher's eyes only."""

    def __init__(self, box: BlackBox) -> None:
        self._box = box

    async def advised(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        answers = await self._box.answers(prompts)
        return [
            dataclasses.replace(prompt, advice=answer.text) for prompt, answer in zip(prompts, answers, strict=True)
        ]


class LikenessOrder:
    """Answers in the order of their likeness to the black box's own: shared text by the gestalt ratio of difflib."""

    def __init__(self, box: BlackBox) -> None:
        self._box = box

    async def order(self, prompt: Prompt, answers: Sequence[str]) -> list[int]:
        """Of two that are equally alike, the first."""
        (own,) = await self._box.answers([prompt])
        ratio = [SequenceMatcher(None, own.text, answer, autojunk=False).ratio() for answer in answers]
        return sorted(range(len(answers)), key=lambda index: -ratio[index])


class AskedOrder:
    """Answers in the order that the black box gives them."""

    def __init__(self, box: BlackBox, template: str) -> None:
        self._box = box
        self._template = template

    async def order(self, prompt: Prompt, answers: Sequence[str]) -> list[int]:
        """Raises TeacherRefused when the reply is no order of the answers."""
        names = [str(number) for number in range(1, 1 + len(answers))]
        numbered = "\n\n".join(f"[{name}]\n{answer}" for name, answer in zip(names, answers, strict=True))
        parts = {"prompt": prompt.messages[-1].content, "answers": numbered}
        text = re.sub(r"\{(prompt|answers)\}", lambda match: parts[match[1]], self._template)
        reply = await self._box.ask((Message(role="user", content=text),))
        found = re.findall(r"[0-9]+", reply.text)
        if sorted(found) != sorted(names):
            raise TeacherRefused(
                f"asked to rank {len(answers)} answers to prompt {prompt.id}, the teacher did not name each of their "
                "numbers once: change teacher.ranking, or use a model that follows it"
            )
        return [names.index(name) for name in found]
