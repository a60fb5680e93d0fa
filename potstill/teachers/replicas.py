"""Replicas: several servers of one teacher. The first is asked; the next when it is away.

Only servers with equal identities are replicas: one that names another model, revision or tokenizer is an error, not a
stand-in, because scores of two teachers must not be mixed. It retries nothing itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from potstill.errors import TeacherRefused, TeacherUnavailable
from potstill.teachers.scorer import Scorer
from potstill.types import TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem

Result = TypeVar("Result")


class Replicas:
    """Asks the server that answered last, so that a server that is away costs its deadline once."""

    def __init__(self, servers: Sequence[Scorer]) -> None:
        self._servers = list(servers)

    async def capabilities(self) -> Capabilities:
        """Of the server that answers. Raises TeacherRefused when another one that answers is not the same teacher."""
        able = await self._first(lambda server: server.capabilities())
        for server in self._servers[1:]:
            with contextlib.suppress(TeacherUnavailable):  # `score` compares it when it answers
                _require_same(able.identity, (await server.capabilities()).identity)
        return able

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        """As Scorer. Without `expect` the identity of the first answer is expected of all of them."""
        wanted = (await self._first(lambda server: server.capabilities())).identity if expect is None else expect
        return await self._first(lambda server: server.score(items, ask, wanted))

    async def aclose(self) -> None:
        for server in self._servers:
            await server.aclose()

    async def _first(self, ask: Callable[[Scorer], Awaitable[Result]]) -> Result:
        """What the first server says that is there. Raises the last one's TeacherUnavailable when none is."""
        *others, last = self._servers  # as they are now: whoever asks at the same time may move one
        for server in others:
            try:
                return await ask(server)
            except TeacherUnavailable:
                self._servers.remove(server)
                self._servers.append(server)
        return await ask(last)


def _require_same(first: TeacherIdentity, other: TeacherIdentity) -> None:
    if first != other:
        raise TeacherRefused(
            f"teacher.replicas: {other.name} {other.revision} is not {first.name} {first.revision}; replicas serve "
            "the same weights and tokenizer"
        )
