"""The server's numbers for Prometheus, in a registry of their own. Labels come from our own code, never from a client.

It counts what it is told and asks the queue and the places what they hold; it decides nothing.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from teacher_server.batching import BatchReport, ScoringQueue
from teacher_server.places import Places

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_JOBS = tuple(2**power for power in range(11))
_TOKENS = tuple(2**power for power in range(4, 19))


class Metrics:
    """One server's. `shared_tokens` is what sharing contexts has spared the model so far."""

    def __init__(self, queue: ScoringQueue, places: Places) -> None:
        self.registry = CollectorRegistry()
        self.answers = self._counter("teacher_requests", "Answers by status.", "status")
        self.refusals = self._counter("teacher_refusals", "Answers other than 200, by code.", "code")
        self.tokens = self._counter("teacher_scored_tokens", "Completion tokens scored.")
        self.seconds = self._histogram("teacher_score_seconds", "Wall time of answered requests.", _SECONDS)
        self._waits = self._histogram("teacher_wait_seconds", "Per job, from the queue to its batch.", _SECONDS)
        self._compute = self._histogram("teacher_compute_seconds", "Per batch.", _SECONDS)
        self._batch_jobs = self._histogram("teacher_batch_jobs", "Jobs of a batch.", _JOBS)
        self._batch_tokens = self._histogram("teacher_batch_tokens", "Tokens of a batch, without padding.", _TOKENS)
        for name, what, read in (
            ("teacher_queue_tokens", "Tokens waiting or being scored.", lambda: queue.tokens),
            ("teacher_inflight_requests", "Requests from headers to answer.", lambda: places.num_requests),
            ("teacher_inflight_bytes", "Bytes of their bodies and answers.", lambda: places.num_bytes),
        ):
            Gauge(name, what, registry=self.registry).set_function(read)
        queue.watch(self._batch)

    def _batch(self, report: BatchReport) -> None:
        self._batch_jobs.observe(report.num_jobs)
        self._batch_tokens.observe(report.num_tokens)
        self._compute.observe(report.compute_s)
        for wait_s in report.waits_s:
            self._waits.observe(wait_s)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, buckets=buckets, registry=self.registry)
