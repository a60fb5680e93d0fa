"""A run in one process: handles that count the bytes of calls, and a clock that skips what everybody would wait."""

from __future__ import annotations

import asyncio
import pickle
import selectors
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


class Wire:
    """Handles of stand-ins in this process: what a call takes and what it answers travel as bytes, and are counted."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def handle(self, actor: object) -> Any:
        return _Handle(self, actor)

    def carried(self, value: Any) -> Any:
        content = pickle.dumps(value, protocol=5)
        self.num_bytes += len(content)
        return pickle.loads(content)  # noqa: S301  our own bytes, of a moment ago


class _Handle:
    def __init__(self, wire: Wire, actor: object) -> None:
        self._wire = wire
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return _Method(self._wire, getattr(self._actor, name))


@dataclass(frozen=True, slots=True)
class _Method:
    wire: Wire
    method: Callable[..., Awaitable[Any]]

    async def remote(self, *arguments: Any) -> Any:
        return self.wire.carried(await self.method(*self.wire.carried(arguments)))


class Skipping(asyncio.SelectorEventLoop):
    """Its time passes while something is computed, and is skipped while everybody waits."""

    def __init__(self) -> None:
        self.skipped = 0.0
        super().__init__(_Impatient(self))

    def time(self) -> float:
        return super().time() + self.skipped


class _Impatient(selectors.DefaultSelector):
    def __init__(self, clock: Skipping) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)
        ready = super().select(0)
        if not ready:
            self._clock.skipped += max(0.0, timeout)
        return ready
