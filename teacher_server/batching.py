"""A bounded queue of scoring jobs and the one thread that drains it, batch by batch.

    submit (any thread) ──► turns ──► thread: deal a round, cut it into batches, score ──► futures
    between (any thread) ─► barrier ─► thread: run it, when all in front of it is scored

Bounded by tokens, not by requests: a job that does not fit is refused at once with the time to wait, never parked.
A job leaves the queue at once when its future is cancelled, and is not scored once its deadline has passed.
It knows no torch and no HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import structlog

from potstill.errors import TeacherUnavailable, WeightsError
from potstill.types import IntArray, TeacherIdentity, TeacherScores
from potstill.wire import Ask, unscored
from teacher_server.batches import cut
from teacher_server.turns import Turns

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One completion, ready to be scored. `input_ids` is context + completion without its last token."""

    input_ids: IntArray  # [L], L >= T
    completion_ids: IntArray  # [T]; token t is predicted by position L - T + t
    token_ids: IntArray | None  # [T, ask.num_ids]
    ask: Ask
    seed: int  # of this job's draws

    @property
    def context_length(self) -> int:
        """Tokens in front of the completion."""
        return len(self.input_ids) - len(self.completion_ids) + 1

    def unscored(self, identity: TeacherIdentity, status: int) -> TeacherScores:
        """The answer to this job when there is none."""
        return unscored(identity, status, num_tokens=len(self.completion_ids), ask=self.ask)


Scored = Future[TeacherScores | None]


class QueueFull(TeacherUnavailable):
    """No room for these jobs now. args: message, seconds after which there should be."""

    @property
    def retry_after_s(self) -> int:
        return int(self.args[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """One pass of the model, for whoever counts."""

    num_jobs: int
    num_tokens: int
    waits_s: tuple[float, ...]  # per job, from submission to the start of its batch
    compute_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    """A job's place in the queue. Times are time.monotonic()'s."""

    job: Job
    future: Scored
    since: float
    deadline: float

    @property
    def tokens(self) -> int:
        return len(self.job.input_ids)


@dataclass(frozen=True, slots=True)
class _Barrier:
    action: Callable[[], None]
    future: Future[None]


class ScoringQueue:
    """Jobs in, futures of TeacherScores out; a future holds None when its job failed, or the thread has ended.

    `score` and barriers run on one thread only. `batch_tokens` bounds the tokens that a batch reads; a longer job is a
    batch by itself. `window_s` is how long an idle machine lets the first batch gather company; a busy one never waits.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Job]], Sequence[TeacherScores]],
        *,
        capacity: int,
        batch_tokens: int,
        window_s: float,
    ) -> None:
        self._score = score
        self._capacity = capacity
        self._batch_tokens = batch_tokens
        self._window_s = window_s
        self._turns: Turns[_Ticket, _Barrier] = Turns()
        self._round: Sequence[_Ticket] = ()
        self._tokens = 0
        self._tokens_per_s = 0.0  # of the latest batch; 0 until there was one
        self._watchers: list[Callable[[BatchReport], None]] = []
        self._closing = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._worker.start()

    @property
    def tokens(self) -> int:
        """Waiting and being scored."""
        return self._tokens

    @property
    def alive(self) -> bool:
        return self._worker.is_alive() and not self._closing

    @property
    def seconds_to_drain(self) -> int:
        """Clamped to 1..120, beyond which OpenAI's clients give up."""
        seconds = self._tokens / self._tokens_per_s if self._tokens_per_s else 1.0
        return min(120, max(1, math.ceil(seconds)))

    def watch(self, watcher: Callable[[BatchReport], None]) -> None:
        """Call `watcher` after every batch, on the scoring thread."""
        self._watchers.append(watcher)

    def submit(self, jobs: Sequence[Job], *, deadline: float) -> list[Scored]:
        """Take all of the jobs of one request, or raise QueueFull and take none. `deadline` is time.monotonic()'s."""
        now = time.monotonic()
        tickets = [_Ticket(job, Future(), now, deadline) for job in jobs]
        total = sum(ticket.tokens for ticket in tickets)
        with self._changed:
            if not self.alive or self._tokens + total > self._capacity:
                raise QueueFull("the scoring queue is full", self.seconds_to_drain)
            self._tokens += total
            self._turns.add(tickets)
            self._changed.notify()
        for ticket in tickets:
            ticket.future.add_done_callback(partial(self._release, ticket))
        return [ticket.future for ticket in tickets]

    def between(self, action: Callable[[], None]) -> Future[None]:
        """Run `action` on the scoring thread when all that was submitted before is scored, and before all that comes.

        A WeightsError is the future's; after any other error what `action` left behind is unknown, and scoring ends.
        """
        barrier = _Barrier(action, Future())
        with self._changed:
            if not self.alive:
                raise QueueFull("the scoring thread is not running", self.seconds_to_drain)
            self._turns.add_barrier(barrier)
            self._changed.notify()
        return barrier.future

    def close(self) -> None:
        """Score what is pending, then stop. Later jobs are refused."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._worker.join()

    def _release(self, ticket: _Ticket, _: Scored) -> None:
        with self._changed:
            self._turns.discard(ticket)
            self._tokens -= ticket.tokens

    def _work(self) -> None:
        try:
            while self._wait():
                with self._changed:
                    barrier = self._turns.pass_barrier()
                    self._round = self._turns.deal(self._batch_tokens, _reading()) if barrier is None else ()
                if barrier is not None:
                    self._pass(barrier)
                for batch in cut([ticket.job for ticket in self._round], self._batch_tokens):
                    self._run([self._round[index] for index in batch])
        finally:
            self._abandon()

    def _wait(self) -> bool:
        """True as soon as there is work; False when there is none and never will be."""
        with self._changed:
            if not self._turns:
                self._changed.wait_for(lambda: self._turns or self._closing)
                self._changed.wait_for(lambda: self._closing or self._tokens >= self._batch_tokens, self._window_s)
            return bool(self._turns) or not self._closing

    def _run(self, batch: Sequence[_Ticket]) -> None:
        started = time.monotonic()
        for ticket in batch:
            if ticket.deadline <= started:
                ticket.future.cancel()
        live = [ticket for ticket in batch if ticket.future.set_running_or_notify_cancel()]
        if not live:
            return
        results: Sequence[TeacherScores | None]
        try:
            results = self._score([ticket.job for ticket in live])
        except RuntimeError as error:  # torch's, out of memory among them: these jobs fail, the next batch may not
            log.error("batch.failed", jobs=len(live), exc_info=error)
            results = [None] * len(live)
        self._report(live, started)
        for ticket, result in zip(live, results, strict=True):
            ticket.future.set_result(result)

    def _report(self, live: Sequence[_Ticket], started: float) -> None:
        report = BatchReport(
            num_jobs=len(live),
            num_tokens=sum(ticket.tokens for ticket in live),
            waits_s=tuple(started - ticket.since for ticket in live),
            compute_s=max(time.monotonic() - started, 1e-6),
        )
        self._tokens_per_s = report.num_tokens / report.compute_s
        for watcher in self._watchers:
            watcher(report)

    def _pass(self, barrier: _Barrier) -> None:
        if not barrier.future.set_running_or_notify_cancel():
            return
        try:
            barrier.action()
        except WeightsError as refused:
            barrier.future.set_exception(refused)
            return
        except BaseException:
            barrier.future.set_exception(TeacherUnavailable("the scoring thread has ended"))
            raise
        barrier.future.set_result(None)

    def _abandon(self) -> None:
        """Whoever still waits when the thread ends is told so; after `close` there is nobody."""
        with self._changed:
            self._closing = True
            waiting, barriers = self._turns.clear()
        for ticket in (*self._round, *waiting):
            with suppress(InvalidStateError):  # answered already, or cancelled
                ticket.future.set_result(None)
        for barrier in barriers:
            barrier.future.set_exception(TeacherUnavailable("the scoring thread has ended"))


def _reading() -> Callable[[_Ticket], int]:
    """What each ticket of one round adds to what the model reads: a context that is in the round is read once."""
    seen: set[bytes] = set()

    def size(ticket: _Ticket) -> int:
        context = ticket.job.input_ids[: ticket.job.context_length].tobytes()
        if context in seen:
            return len(ticket.job.completion_ids)
        seen.add(context)
        return ticket.tokens

    return size
