"""A buffer and those who use it: workers that write at once, or that hold what they were given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.buffer import Buffer
from potstill.config import LoopConfig
from potstill.types import Receipt, StepBatch
from tests.receipts import make_receipt


def make_buffer(
    *, B: int = 2, C: int = 9, steps: int = 3, S: int = 0, unscored: float = 0.0, version: int = 0,
    trained: list[int] | None = None, **loop: Any,
) -> Buffer:  # fmt: skip
    config = LoopConfig(steps=steps, max_staleness=S, max_unscored_fraction=unscored, **loop)
    return Buffer(config, prompts_per_step=B, prompts_per_call=C, version=version, trained=trained)


def prompts_of(batch: StepBatch) -> list[str]:
    return [receipt.prompt_id for receipt in batch.receipts]


async def waits(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """The call as a task that is still waiting after everything else had its turn."""
    task = asyncio.create_task(call)
    await turns()
    assert not task.done()
    return task


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def leased(buffer: Buffer, version: Callable[[], int] = lambda: 0) -> range:
    """The chunk that a worker with these weights gets; it is given back at once."""
    async with buffer.lease(version) as chunk:
        return chunk


async def write(buffer: Buffer, version: int = 0, **receipt: Any) -> range:
    """Lease a chunk and hand it in, a completion of each prompt."""
    async with buffer.lease(lambda: version) as chunk:
        buffer.put(chunk, [[make_receipt(prompt, version=version, **receipt)] for prompt in chunk])
        return chunk


@dataclass
class Holder:
    """A worker that is still writing: it holds its lease until it is told what to do."""

    buffer: Buffer
    version: int = 0
    chunk: range | None = None
    ended: list[str] = field(default_factory=list)
    _told: asyncio.Future[Callable[[range], None]] = field(default_factory=asyncio.Future)

    async def work(self) -> None:
        async with self.buffer.lease(lambda: self.version) as self.chunk:
            (await self._told)(self.chunk)
        self.ended.append("quietly")

    def finish(self) -> None:
        self._told.set_result(
            lambda chunk: self.buffer.put(chunk, [[make_receipt(p, version=self.version)] for p in chunk])
        )

    def fail(self) -> None:
        self._told.set_exception(OSError("broken"))


async def hold(buffer: Buffer, version: int = 0) -> tuple[Holder, asyncio.Task[None]]:
    holder = Holder(buffer, version)
    return holder, await waits(holder.work())


def spanning(prompt: int, *counts: tuple[int, int, int]) -> Receipt:
    """A text that several versions wrote: version, its loss tokens, unscored ones among them."""
    receipt = make_receipt(prompt, version=counts[0][0], tokens=sum(tokens for _, tokens, _ in counts))
    return replace(receipt, num_unscored_tokens=sum(missing for *_, missing in counts), by_version=counts)
