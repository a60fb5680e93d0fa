"""Writers: teachers that write text, whoever serves them.

    POST …/chat/completions    messages, rendered by the endpoint                   every OpenAI-compatible API
    POST …/completions         token ids, rendered here by a local chat template    base models, templates of one's own

It refuses, with NoAnswer, whatever is no answer: an empty text, one that a content filter ended, a tool call. It counts
no tokens itself, retries nothing and scores nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, NonNegativeInt, TypeAdapter

from potstill.calling.outbound import Endpoint
from potstill.errors import NoAnswer
from potstill.teachers.foreign import JSON, SMALL_ANSWER_BYTES, Reading, parsed
from potstill.tokenization import render
from potstill.types import FinishReason, Message

_VERSION = re.compile(r"/v\d\w*(/|$)")
_TOKEN_BYTES = 256  # of one token in JSON, escaped, and of what an endpoint may say besides


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One answer. Token counts are the endpoint's, which it charges for; None: it does not count."""

    text: str
    finish_reason: FinishReason
    tokens_in: int | None
    tokens_out: int | None


class Writer(Protocol):
    """A teacher that writes. Lives in one event loop."""

    async def write(self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int) -> Written:
        """The assistant's answer to `messages`.

        Raises TeacherRefused for a refused request, NoAnswer for what is no answer, TeacherUnavailable when it is away.
        """

    async def aclose(self) -> None:
        """Close its connections."""


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None


class _Said(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Said | None = None  # of a chat
    text: str | None = None  # of a completion
    finish_reason: str | None = None


class _Answer(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None  # some say null


_ANSWER = TypeAdapter(_Answer)


def versioned(url: str) -> str:
    """An API's base URL with its version, which people write with or without: /v1 where it has none.

    >>> versioned("https://api.example.com"), versioned("https://api.example.com/v1beta/openai")
    ('https://api.example.com/v1', 'https://api.example.com/v1beta/openai')
    """
    return url if _VERSION.search(url) else f"{url.rstrip('/')}/v1"


class ChatWriter:
    """Writer over an OpenAI-compatible endpoint.

    The endpoint's URL ends with the API's version, as in https://api.example.com/v1. `tokenizer` is a folder whose chat
    template renders the messages here; None: the endpoint renders them. Endpoints that know no seed ignore it.
    """

    def __init__(self, endpoint: Endpoint, *, model: str, tokenizer: Path | None = None) -> None:
        self._endpoint = endpoint
        self._model = model
        self._reading = None if tokenizer is None else Reading(tokenizer)

    async def write(self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int) -> Written:
        """As Writer. `max_tokens` and `temperature` are always sent: an endpoint's defaults are not ours."""
        path, prompt = self._prompt(messages)
        asked = {
            "model": self._model,
            **prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "n": 1,
            "stream": False,
        }
        answer = await self._endpoint.call(
            "POST",
            path,
            body=json.dumps(asked).encode(),
            content_type=JSON,
            accept=JSON,
            limit_bytes=SMALL_ANSWER_BYTES + max_tokens * _TOKEN_BYTES,
        )
        if answer.status != 200:
            raise self._endpoint.refusal(answer)
        return self._written(parsed(_ANSWER, answer, path))

    async def aclose(self) -> None:
        await self._endpoint.aclose()

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, Mapping[str, Any]]:
        if self._reading is not None:
            return "/completions", {"prompt": render(self._reading.tokenizer, messages)}
        said = [{"role": message.role, "content": message.content} for message in messages]
        return "/chat/completions", {"messages": said}

    def _written(self, answer: _Answer) -> Written:
        usage = answer.usage or _Usage()

        def no_answer(why: str) -> NoAnswer:
            return NoAnswer(f"{self._model} {why}", usage.prompt_tokens, usage.completion_tokens)

        if len(answer.choices) != 1:
            raise no_answer(f"gave {len(answer.choices)} answers to one question")
        choice = answer.choices[0]
        said = choice.message or _Said(content=choice.text)
        ended = "refusal" if said.refusal else str(choice.finish_reason)[:40]
        if ended not in set(FinishReason):
            raise no_answer(f"did not answer: it ended with {ended!r}")
        if not said.content:
            raise no_answer(f"wrote nothing before it ended with {ended!r}: raise max_tokens if it thinks unseen")
        return Written(
            text=said.content,
            finish_reason=FinishReason(ended),
            tokens_in=usage.prompt_tokens,
            tokens_out=usage.completion_tokens,
        )
