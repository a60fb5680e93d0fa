"""BlackBox: a paid API that is asked in words. Asked once for the same thing, and never beyond its budget.

    question ──► answers on disk? ──► reserve what it may cost ──► ask ──► settle ──► keep

It makes the question from a prompt, and knows nothing of what its answers are used for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, TypeVar

from potstill.calling.meter import Meter, Reservation
from potstill.config_teachers import RemoteWriter
from potstill.errors import NoAnswer
from potstill.privilege import privileged_messages
from potstill.teachers.cache import AnswerStore, Paid, Question
from potstill.teachers.writer import Writer
from potstill.types import Message, Prompt

_FRAME_TOKENS = 64  # of a message's role and template, at most

Result = TypeVar("Result")


class BlackBox:
    """Owns the writer and the store, and closes them. `place` is where its settings stand in a config."""

    def __init__(self, writer: Writer, store: AnswerStore, meter: Meter, config: RemoteWriter, *, place: str) -> None:
        self._writer = writer
        self._store = store
        self._meter = meter
        self._config = config
        self._place = place

    async def answers(self, prompts: Sequence[Prompt]) -> list[Paid]:
        """What it says to each prompt, put to it in the words of `instruction`. Raises as `ask`, and ConfigError for a
        prompt without what the instruction shows."""
        setting = f"{self._place}.instruction"
        asked = [privileged_messages(prompt, self._config.instruction, setting) for prompt in prompts]
        return await together(self.ask(messages) for messages in asked)

    async def ask(self, messages: Sequence[Message]) -> Paid:
        """Its answer to a conversation. Raises BudgetExhausted before it would cost too much, else TeacherError."""
        question = Question(
            model=self._config.model,
            parameters={"temperature": self._config.temperature, "max_tokens": self._config.max_tokens},
            messages=messages,
        )
        return await self._store.get_or_ask(question, lambda: self._paid(question))

    @property
    def totals(self) -> dict[str, Any]:
        """What was asked and what it cost, for reports."""
        return {**self._meter.totals(), "answers_kept": self._store.hits, "answers_asked": self._store.misses}

    async def aclose(self) -> None:
        await self._writer.aclose()
        self._store.close()

    async def _paid(self, question: Question) -> Paid:
        # nobody has counted its tokens yet, and none is shorter than a byte
        most = sum(len(message.content.encode()) + _FRAME_TOKENS for message in question.messages)
        with self._meter.reserve(most, self._config.max_tokens) as reserved:
            try:
                answer = await self._writer.write(
                    question.messages,
                    max_tokens=self._config.max_tokens,
                    temperature=self._config.temperature,
                    seed=int(question.key[:8], 16),
                )
            except NoAnswer as error:
                self._settle(reserved, most, *error.tokens)
                raise
            tokens_in, tokens_out, cost_usd = self._settle(reserved, most, answer.tokens_in, answer.tokens_out)
        return Paid(
            text=answer.text,
            finish_reason=answer.finish_reason,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost_usd=cost_usd,
        )

    def _settle(
        self, reserved: Reservation, most: int, tokens_in: int | None, tokens_out: int | None
    ) -> tuple[int, int, str]:
        """Tokens read and written, and their cost. Who does not count is taken to have charged all that it might."""
        read = most if tokens_in is None else tokens_in
        written = self._config.max_tokens if tokens_out is None else tokens_out
        return read, written, reserved.settle(read, written)


async def together(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """What all of them return, in their order, or the first failure among them, once all have ended: an answer that is
    under way when another fails is paid for, and is kept."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]
