"""Open connections to registered teachers that score, shared by all who ask: one for each teacher, tokenizer and table.

    asked ──► opened, or found open ──► score ──► given back
                     │ its teacher was changed, or too many are open
                     └──► retired: closed when the last who uses it gives it back

Lives in one event loop. Refuses more questions at a time than it has places for, before any is asked.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from orchestrator.service.registry import Registry
from orchestrator.service.store.teachers import Teacher
from potstill.config_teachers import RemoteWriter, ServerTeacher
from potstill.errors import ConfigError, ServiceError
from potstill.probing.probe import open_alone
from potstill.teachers.opening import open_servers
from potstill.teachers.scorer import Scorer
from potstill.tokenization import load_tokenizer

MOST_OPEN = 32
MOST_AT_A_TIME = 64

_Key = tuple[str, int, str | None]  # a teacher, its revision, a tokenizer's name


@dataclass(slots=True)
class _Open:
    scorer: Scorer
    users: int = 0
    retired: bool = False


class Scorers:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._open: OrderedDict[_Key, _Open] = OrderedDict()
        self._opening = asyncio.Lock()
        self.asked = 0

    @asynccontextmanager
    async def of(self, teacher: Teacher, tokenizer: str | None) -> AsyncIterator[Scorer]:
        """Its scorer, while the block lasts. `tokenizer` names the teacher's own, where its table does not.

        Raises ServiceError: 400 for a teacher that scores nothing, 503 when all places are taken; ConfigError.
        """
        if self.asked >= MOST_AT_A_TIME:
            raise ServiceError("too much is being scored: try again later", 503, "overloaded")
        self.asked += 1
        try:
            one = await self._taken(teacher, tokenizer)
            try:
                yield one.scorer
            finally:
                one.users -= 1
                await self._close_if_done(one)
        finally:
            self.asked -= 1

    async def aclose(self) -> None:
        """Close those that nobody uses; the others when they are given back."""
        for one in self._open.values():
            one.retired = True
            await self._close_if_done(one)
        self._open.clear()

    async def _taken(self, teacher: Teacher, tokenizer: str | None) -> _Open:
        key = (teacher.id, teacher.revision, tokenizer)
        async with self._opening:
            if key not in self._open:
                self._open[key] = _Open(await asyncio.to_thread(self._opened, teacher, tokenizer))
                await self._retire(key)
            self._open.move_to_end(key)
            self._open[key].users += 1
            return self._open[key]

    async def _retire(self, newest: _Key) -> None:
        """Give up the scorers of a teacher's earlier tables, and those that were not asked for longest."""
        earlier = [key for key in self._open if key[0] == newest[0] and key[1] < newest[1]]
        spare = list(self._open)[: max(0, len(self._open) - MOST_OPEN)]
        for key in {*earlier, *spare} - {newest}:
            one = self._open.pop(key)
            one.retired = True
            await self._close_if_done(one)

    async def _close_if_done(self, one: _Open) -> None:
        if one.retired and not one.users:
            await one.scorer.aclose()

    def _opened(self, teacher: Teacher, tokenizer: str | None) -> Scorer:
        table, access = self._registry.called(teacher)
        guard = self._registry.guard
        if isinstance(table, RemoteWriter):
            raise ServiceError(f"{teacher.id} writes text and scores none", 400, "scores_nothing")
        try:
            if isinstance(table, ServerTeacher):
                return open_servers(table, access, guard)
            folder = tokenizer_of(self._registry, table.tokenizer, tokenizer)
            return open_alone(table, access, student=load_tokenizer(folder), guard=guard)[0]
        except ConfigError:  # which tells where it is, or where its tokenizer lies
            message = f"{teacher.id} cannot be called, or its tokenizer not be read: register it anew"
            raise ServiceError(message, 503, "teacher_not_called") from None


def tokenizer_of(registry: Registry, own: str | None, named: str | None) -> Path:
    """The folder of a teacher's tokenizer: its table's, or the one that a client names.

    Raises ServiceError: 400 when nobody names one that is here, 503 where nothing is installed that reads it.
    """
    if find_spec("transformers") is None:
        raise ServiceError("this service lacks transformers, which reads tokenizers", 503, "no_transformers")
    if own is not None:
        return Path(own)
    if named is None:
        message = "this teacher does not tell its tokens: name a model with its tokenizer as `tokenizer`"
        raise ServiceError(message, 400, "tokenizer_needed")
    try:
        return registry.tokenizer(named)
    except ConfigError as error:
        raise ServiceError(str(error), 400, "tokenizer_unknown") from None
