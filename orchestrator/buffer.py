"""The one home of the staleness rule: what may be written now, what is too old, and what makes a batch. Pure asyncio.

    lease ──► put ──► batch ──► trained
      ▲        │ too old, or its worker was lost
      └────────┘

Optimizer step s (from 1) is made by the learner at version s − 1 and makes version s. What it trains on was written by
version s − 1 − S or later, S being max_staleness; order.py says which prompts that are. With S = 0 the next prompts
start when the new weights are loaded: synchronous training is this buffer with S = 0.

Prompts are leased in chunks, always the same ones, so that a chunk which is written again holds the same text. A lease
that ends without `put` gives its chunk back. Every prompt is trained once: whatever is refused is leased again.
`stale = "mask"` trains a text that spans versions on its fresh tokens, and leaves the older ones out of the loss.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby

from orchestrator.order import order_of
from potstill.config import LoopConfig
from potstill.errors import RunError, SignalLost
from potstill.types import Receipt, StepBatch

Groups = Sequence[Sequence[Receipt]]
"""Receipts by prompt of a chunk."""


@dataclass(slots=True)
class _Lease:
    chunk: range
    version: int  # of its worker when it began
    task: asyncio.Task[object]
    handed_in: bool = False
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class _Waiter:
    version: Callable[[], int]
    woken: asyncio.Future[None]


class Closed(Exception):
    """The run was asked to stop: there are no more batches."""


class Buffer:
    """Leases chunks of prompts to any number of workers and gives batches to one learner."""

    def __init__(
        self,
        loop: LoopConfig,
        *,
        prompts_per_step: int,
        prompts_per_call: int,
        version: int = 0,
        trained: Iterable[int] | None = None,
    ) -> None:
        """`version` and `trained`: where a run goes on; None: the prompts of the steps so far."""
        self._loop = loop
        self._order = order_of(loop, prompts_per_step)
        self._prompts_per_step = prompts_per_step
        self._prompts_per_call = min(prompts_per_call, prompts_per_step)
        self._num_prompts = loop.steps * prompts_per_step
        self._version = version
        self._trained = _Trained(range(version * prompts_per_step) if trained is None else trained)
        self._groups: dict[int, Sequence[Receipt]] = {}
        self._leases: dict[int, _Lease] = {}
        self._num_leased = 0  # prompts that somebody writes
        self._returned: list[tuple[int, int]] = []  # heap of chunks as (start, stop)
        self._next = 0
        self._taken = version  # the step whose batch was taken last
        self._writers: list[_Waiter] = []  # for a chunk
        self._learner: asyncio.Future[None] | None = None  # for a batch
        self._is_closed = False
        self.num_refused = 0  # groups that were too old when their turn came

    @property
    def num_waiting(self) -> int:
        """Prompts scored and not yet trained on."""
        return len(self._groups)

    @property
    def trained(self) -> list[range]:
        """The prompts whose batches were taken, as a checkpoint keeps them."""
        return self._trained.ranges()

    def refill(self, groups: Mapping[int, Sequence[Receipt]]) -> int:
        """Take back what was scored before a run went on; what is trained or too old is left out. Returns how many."""
        kept = {
            index: receipts
            for index, receipts in groups.items()
            if index not in self._trained and index < self._num_prompts and self._is_fresh(receipts, self._version + 1)
        }
        self._groups |= kept
        return len(kept)

    @asynccontextmanager
    async def lease(
        self, version: Callable[[], int], waiting: AbstractContextManager[None] | None = None
    ) -> AsyncIterator[range]:
        """Wait, inside `waiting`, for a chunk that a worker with weights `version()` may write, and hold it meanwhile.

        A block that becomes useless, because the learner moved on, ends early and quietly.
        """
        with waiting or nullcontext():
            chunk = await self._next_chunk(version)
        task = asyncio.current_task()
        assert task is not None
        lease = self._leases[chunk.start] = _Lease(chunk, version(), task)
        self._num_leased += len(chunk)
        try:
            yield chunk
        except asyncio.CancelledError:
            if not lease.revoked or task.uncancel() > 0:
                raise
        finally:
            del self._leases[chunk.start]
            if not lease.handed_in:
                self._num_leased -= len(chunk)
                heapq.heappush(self._returned, (chunk.start, chunk.stop))
                self._wake_writers()

    def put(self, chunk: range, groups: Groups) -> None:
        """Hand in all completions of a leased chunk. Raises RunError when they cannot be what was leased."""
        lease = self._leases.get(chunk.start)
        if lease is None or lease.chunk != chunk or lease.handed_in:
            raise RunError(f"prompts {chunk.start} to {chunk.stop - 1} were handed in without a lease")
        if len(groups) != len(chunk) or not all(groups):
            raise RunError(f"prompts {chunk.start} to {chunk.stop - 1}: some came back without a completion")
        if any(0 <= receipt.oldest_version < lease.version for group in groups for receipt in group):
            raise RunError(f"prompts {chunk.start} to {chunk.stop - 1} are older than version {lease.version}")
        lease.handed_in = True
        self._num_leased -= len(chunk)
        self._groups |= zip(chunk, groups, strict=True)
        self._refuse_the_old(self._version + 1, chunk)
        self._wake_learner()

    def close(self) -> None:
        """Give no more batches: whoever waits for one gets Closed."""
        self._is_closed = True
        self._wake_learner()

    async def batch(self, step: int) -> StepBatch:
        """Wait for the prompts of `step`. Raises SignalLost when too few of its tokens could be scored."""
        self._refuse_the_old(step, list(self._groups))
        while (chosen := self._chosen(step)) is None:
            self._learner = asyncio.get_running_loop().create_future()
            await self._learner
        receipts = tuple(receipt for index in chosen for receipt in self._groups.pop(index))
        self._trained.add(chosen)
        self._taken = step
        self._wake_writers()
        return self._batch(step, receipts)

    def advance(self, version: int) -> None:
        """The learner's weights are `version`: leases that can only end too old are ended, and more may start."""
        self._version = version
        if self._loop.stale == "refuse" and self._loop.order == "finish":
            for lease in self._leases.values():
                if lease.version < version - self._loop.max_staleness and not (lease.handed_in or lease.revoked):
                    lease.revoked = True
                    lease.task.cancel()
        self._wake_writers()

    def worker_moved(self) -> None:
        """A worker has loaded newer weights: it may start more."""
        self._wake_writers()

    def _chosen(self, step: int) -> Sequence[int] | None:
        if self._is_closed:
            raise Closed
        return self._order.choose(step, self._groups)

    def _batch(self, step: int, receipts: tuple[Receipt, ...]) -> StepBatch:
        oldest = self._oldest(step)
        counts = [receipt.fresh_tokens(oldest) for receipt in receipts]
        loss_tokens, unscored = sum(tokens for tokens, _ in counts), sum(missing for _, missing in counts)
        if unscored > self._loop.max_unscored_fraction * loss_tokens or unscored == loss_tokens:
            raise SignalLost(
                f"step {step}: {unscored} of {loss_tokens} loss tokens have no teacher's score; "
                f"loop.max_unscored_fraction allows {self._loop.max_unscored_fraction:.0%}"
            )
        return StepBatch(
            step=step,
            receipts=receipts,
            num_loss_tokens=loss_tokens - unscored,
            num_sequences=sum(tokens > missing for tokens, missing in counts),
            oldest_version=oldest,
        )

    async def _next_chunk(self, version: Callable[[], int]) -> range:
        while True:
            chunk = self._candidate()
            if chunk is not None and self._may_start(chunk, version()):
                if self._returned:
                    heapq.heappop(self._returned)
                else:
                    self._next = chunk.stop
                return chunk
            waiter = _Waiter(version, asyncio.get_running_loop().create_future())
            self._writers.append(waiter)
            await waiter.woken

    def _may_start(self, chunk: range, worker: int) -> bool:
        started = len(self._groups) + self._num_leased
        return self._order.may_start(chunk, worker=worker, taken=self._taken, started=started)

    def _candidate(self) -> range | None:
        """The first chunk that nobody writes, has written or has trained; None when there is none."""
        if self._returned:
            return range(*self._returned[0])
        while self._next < self._num_prompts:
            place = self._next % self._prompts_per_step
            room = min(self._prompts_per_call - place % self._prompts_per_call, self._prompts_per_step - place)
            cell = range(self._next, self._next + room)
            missing = [index for index in cell if index not in self._groups and index not in self._trained]
            if missing:
                return _first_run(missing)
            self._next = cell.stop
        return None

    def _refuse_the_old(self, step: int, indices: Iterable[int]) -> None:
        """Of what is handed in, have written anew what `step` may not train on."""
        for index in indices:
            if not self._is_fresh(self._groups[index], step):
                del self._groups[index]
                heapq.heappush(self._returned, (index, index + 1))
                self.num_refused += 1
        if self._returned:
            self._wake_writers()

    def _is_fresh(self, receipts: Sequence[Receipt], step: int) -> bool:
        """Whether step `step` may train on them, if not on every token."""
        oldest = self._oldest(step)
        if self._loop.stale == "refuse":
            return all(receipt.oldest_version < 0 or receipt.oldest_version >= oldest for receipt in receipts)
        return any(receipt.fresh_tokens(oldest)[0] for receipt in receipts)

    def _oldest(self, step: int) -> int:
        return max(0, step - 1 - self._loop.max_staleness)

    def _wake_learner(self) -> None:
        if self._learner is not None and not self._learner.done():
            self._learner.set_result(None)

    def _wake_writers(self) -> None:
        """Those who may start: there can be thousands who may not."""
        chunk = self._candidate()
        if chunk is None:
            return
        waiting, self._writers = self._writers, []
        for waiter in waiting:
            if self._may_start(chunk, waiter.version()):
                if not waiter.woken.done():
                    waiter.woken.set_result(None)
            elif not waiter.woken.done():
                self._writers.append(waiter)


class _Trained:
    """A set of prompts that has few holes, however many there are."""

    def __init__(self, indices: Iterable[int]) -> None:
        self._all_before = 0
        self._others: set[int] = set()
        self.add(indices)

    def __contains__(self, index: int) -> bool:
        return index < self._all_before or index in self._others

    def add(self, indices: Iterable[int]) -> None:
        self._others.update(indices)
        while self._all_before in self._others:
            self._others.remove(self._all_before)
            self._all_before += 1

    def ranges(self) -> list[range]:
        runs = [list(run) for _, run in groupby(enumerate(sorted(self._others)), lambda pair: pair[1] - pair[0])]
        first = [range(self._all_before)] if self._all_before else []
        return first + [range(run[0][1], run[-1][1] + 1) for run in runs]


def _first_run(indices: Sequence[int]) -> range:
    """The consecutive numbers that a sorted list begins with."""
    stop = next((i for i, index in enumerate(indices) if index != indices[0] + i), len(indices))
    return range(indices[0], indices[0] + stop)
