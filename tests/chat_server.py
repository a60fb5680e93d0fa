"""A small OpenAI-compatible chat server on loopback: scripted answers, and a memory of what it was asked.

And the black box that a run makes of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.config_teachers import RemoteWriter
from potstill.teachers.black_box import BlackBox
from potstill.teachers.opening import Access, open_black_box
from tests.endpoints import Said, scripted

PATH = "/v1/chat/completions"
USAGE = {"prompt_tokens": 17, "completion_tokens": 3, "total_tokens": 20}


@dataclass
class ChatServer:
    """`bodies` are those of all requests, in the order in which they came; `url` is without /v1, as a config has it."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_in_flight: int = 0

    @property
    def count(self) -> int:
        return len(self.bodies)

    @property
    def questions(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]


def says(text: str | None, *, finish_reason: str = "stop", usage: Any = USAGE) -> Said:
    """A chat's answer, as vLLM writes it."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
    return 200, {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


@contextmanager
def chat_server(answer: Callable[[str], Said], *, takes_s: float = 0.0) -> Iterator[ChatServer]:
    """Answers the last message of each request with `answer`, after `takes_s`; any other path is a 404."""
    chat = ChatServer()
    lock, in_flight = threading.Lock(), 0

    def reply(path: str, body: Any) -> Said:
        nonlocal in_flight
        if path != PATH:
            return 404, {"error": {"message": f"no such path: {path}"}}
        with lock:
            chat.bodies.append(body)
            in_flight += 1
            chat.most_in_flight = max(chat.most_in_flight, in_flight)
        time.sleep(takes_s)
        with lock:
            in_flight -= 1
        return answer(body["messages"][-1]["content"])

    with scripted(reply) as server:
        chat.url = server.url
        yield chat


@asynccontextmanager
async def opened(
    server: ChatServer, folder: Path, *, number: int = 0, workers: int = 1, **table: Any
) -> AsyncIterator[BlackBox]:
    """As worker `number` of a run in `folder` opens it; `table` is its [teacher] table."""
    config = RemoteWriter(url=server.url, model="m", answers=str(folder / "kept" / "answers.sqlite"), **table)
    access = Access(url=server.url, key="sesame")
    spent = folder / "runs" / "one" / f"spent-{number}.json"
    box = open_black_box(config, access, place="teacher", spent=spent, workers=workers)
    try:
        yield box
    finally:
        await box.aclose()
