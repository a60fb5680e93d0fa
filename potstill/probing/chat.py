"""What an API that writes can be used for, found by two short answers and one completion. That costs a few tokens.

It sends one fixed question, shows nothing of the answers, and keeps none.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from potstill.calling.outbound import Endpoint
from potstill.errors import AlignmentError, TeacherError
from potstill.teachers.foreign import JSON, SMALL_ANSWER_BYTES
from potstill.teachers.writer import ChatWriter
from potstill.types import Message

QUESTION = (Message(role="user", content="What is 12 + 9? Reply with the number only."),)
MOST_TOKENS = 64
"""Of an answer. Too few: a model that thinks before it answers has nothing to say."""

_MOST_WRITTEN = 1  # tokens behind an echo; some endpoints refuse 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReport:
    """Findings; None where the API did not get that far."""

    problems: tuple[str, ...] = ()
    repeats: bool | None = None  # the same answer twice, at temperature 0
    echoes: bool | None = None  # it also gives log-probs of text that it is given
    latency_ms: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "problems": list(self.problems)}


class _Logprobs(BaseModel):
    token_logprobs: list[float | None]


class _Choice(BaseModel):
    logprobs: _Logprobs


class _Echo(BaseModel):
    choices: list[_Choice]


_ECHO = TypeAdapter(_Echo)


async def probe_chat(endpoint: Endpoint, model: str) -> ChatReport:
    """Ask the API behind `endpoint`, whose URL ends with the API's version. Closes it."""
    writer = ChatWriter(endpoint, model=model)
    try:
        started = time.perf_counter()
        first = await writer.write(QUESTION, max_tokens=MOST_TOKENS, temperature=0.0, seed=0)
        latency_ms = 1000 * (time.perf_counter() - started)
        again = await writer.write(QUESTION, max_tokens=MOST_TOKENS, temperature=0.0, seed=0)
        return ChatReport(
            repeats=first.text == again.text,
            echoes=await _echoes(endpoint, model),
            latency_ms=latency_ms,
            tokens_in=first.tokens_in,
            tokens_out=first.tokens_out,
        )
    except (TeacherError, AlignmentError) as error:
        return ChatReport(problems=(str(error),))
    finally:
        await writer.aclose()


async def _echoes(endpoint: Endpoint, model: str) -> bool:
    """Whether a given text comes back with log-probs: one for each of its tokens but the first."""
    asked = {"model": model, "prompt": "12 + 9 = 21", "echo": True, "logprobs": 1, "max_tokens": _MOST_WRITTEN}
    answer = await endpoint.call(
        "POST",
        "/completions",
        body=json.dumps(asked).encode(),
        content_type=JSON,
        accept=JSON,
        limit_bytes=SMALL_ANSWER_BYTES,
    )
    if answer.status != 200:
        return False
    try:
        found = _ECHO.validate_json(answer.content).choices
    except ValidationError:
        return False
    rows = found[0].logprobs.token_logprobs if len(found) == 1 else []
    return len(rows) > _MOST_WRITTEN + 1 and rows[1] is not None
