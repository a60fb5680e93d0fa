"""A bounded queue of scoring jobs and the one thread that drains it, batch by batch.

    submit (any thread) ──► pending ──► worker: sort by length, cut into batches, score ──► futures

Bounded by tokens, not by requests: a job that does not fit is refused at once with the time to wait, never parked.
A job whose future is cancelled leaves the queue's count at once and is not scored. It knows no torch and no HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import structlog

from potstill.errors import TeacherUnavailable
from potstill.types import IntArray, TeacherIdentity, TeacherScores
from potstill.wire import unscored

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One completion, ready to be scored. `input_ids` is context + completion without its last token."""

    input_ids: IntArray  # [L], L >= T
    completion_ids: IntArray  # [T]; token t is predicted by position L - T + t
    token_ids: IntArray | None  # [T, K]
    top_k: int
    entropy: bool

    @property
    def num_ids(self) -> int:
        return 0 if self.token_ids is None else self.token_ids.shape[1]

    def unscored(self, identity: TeacherIdentity, status: int) -> TeacherScores:
        """The answer to this job when there is none."""
        return unscored(
            identity,
            status,
            num_tokens=len(self.completion_ids),
            top_k=self.top_k,
            num_ids=self.num_ids,
            entropy=self.entropy,
        )


class QueueFull(TeacherUnavailable):
    """No room for these jobs now. args: message, seconds after which there should be."""

    @property
    def retry_after_s(self) -> int:
        return int(self.args[1])


class ScoringQueue:
    """Jobs in, futures of TeacherScores out; a future holds None when the batch of its job failed.

    `score` runs on one thread only. `batch_tokens` bounds a batch's padded size; a longer job is a batch by itself.
    """

    def __init__(
        self, score: Callable[[Sequence[Job]], Sequence[TeacherScores]], *, capacity: int, batch_tokens: int
    ) -> None:
        self._score = score
        self._capacity = capacity
        self._batch_tokens = batch_tokens
        self._pending: list[tuple[Job, Future[TeacherScores | None]]] = []
        self._tokens = 0
        self._tokens_per_s = 0.0  # of the latest batch; 0 until there was one
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

    def submit(self, jobs: Sequence[Job]) -> list[Future[TeacherScores | None]]:
        """Take all of the jobs, or raise QueueFull and take none."""
        futures: list[Future[TeacherScores | None]] = [Future() for _ in jobs]
        total = sum(len(job.input_ids) for job in jobs)
        with self._changed:
            if not self.alive or self._tokens + total > self._capacity:
                raise QueueFull("the scoring queue is full", self._seconds_to_drain())
            self._tokens += total
            self._pending.extend(zip(jobs, futures, strict=True))
            self._changed.notify()
        for job, future in zip(jobs, futures, strict=True):
            future.add_done_callback(partial(self._release, len(job.input_ids)))
        return futures

    def close(self) -> None:
        """Score what is pending, then stop. Later jobs are refused."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._worker.join()

    def _seconds_to_drain(self) -> int:
        """Clamped to 1..120, beyond which OpenAI's clients give up."""
        seconds = self._tokens / self._tokens_per_s if self._tokens_per_s else 1.0
        return min(120, max(1, math.ceil(seconds)))

    def _release(self, tokens: int, _: Future[TeacherScores | None]) -> None:
        with self._changed:
            self._tokens -= tokens

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                drained, self._pending = self._pending, []
            if not drained:
                return
            for batch in cut([job for job, _ in drained], self._batch_tokens):
                self._run([drained[index] for index in batch])

    def _run(self, batch: Sequence[tuple[Job, Future[TeacherScores | None]]]) -> None:
        live = [(job, future) for job, future in batch if future.set_running_or_notify_cancel()]
        if not live:
            return
        started = time.monotonic()
        results: Sequence[TeacherScores | None]
        try:
            results = self._score([job for job, _ in live])
        except RuntimeError:  # torch's, out of memory among them: these jobs fail, the next batch may not
            log.exception("batch.failed", jobs=len(live))
            results = [None] * len(live)
        self._tokens_per_s = sum(len(job.input_ids) for job, _ in live) / max(time.monotonic() - started, 1e-6)
        for (_, future), result in zip(live, results, strict=True):
            future.set_result(result)


def cut(jobs: Sequence[Job], batch_tokens: int) -> list[list[int]]:
    """Indices of `jobs`, shortest first, cut where the padded batch would pass `batch_tokens`."""
    batches: list[list[int]] = []
    for index in sorted(range(len(jobs)), key=lambda index: len(jobs[index].input_ids)):
        longest = len(jobs[index].input_ids)
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
