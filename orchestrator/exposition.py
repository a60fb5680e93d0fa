"""A running run's numbers for Prometheus, on loopback: `loop.metrics_port`.

    journal ──► every event, step and status ──► counters and gauges ◄── GET http://127.0.0.1:<port>/metrics

It repeats what the journal says and measures nothing but the time that a status lasts. What was not measured is NaN,
never 0. Labels come from our own code and the config, never from a model or a teacher. It ends with the run, whose last
numbers are in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from potstill.config import RunConfig
from potstill.errors import ConfigError
from potstill.journal import Journal, Status
from potstill.metrics import METRICS, number

LOOPBACK = "127.0.0.1"
GAUGES = {  # by metric of a step
    "loss": "loss_nats",
    "reverse_kl": "reverse_kl_nats",
    "entropy": "entropy_nats",
    "accuracy": "accuracy_ratio",
    "grad_norm": "gradient_norm",
    "completion_tokens": "completion_tokens",
    "truncated_fraction": "truncated_ratio",
    "unscored_fraction": "unscored_ratio",
    "staleness_mean": "staleness_mean_versions",
    "staleness_max": "staleness_max_versions",
    "queue": "queue_rollouts",
    "tokens_per_second": "tokens_per_second",
    "weights_version": "weights_version",
}
EVENTS = {  # by type
    "worker.lost": ("worker_losses", "Rollout workers that died or fell silent."),
    "run.recovering": ("recoveries", "Times that the run went back to its last checkpoint, e.g. without its learner."),
}
ALARM = "alarm."
SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Exposition:
    """One run's numbers, in a registry of their own. A listener of its journal."""

    def __init__(self, **labels: str) -> None:
        self.registry = CollectorRegistry()
        Info("potstill_run", "Which run this is.", registry=self.registry).info(labels)
        self._steps = self._counter("steps", "Steps done; one that is done again counts once.")
        self._tokens = self._counter("tokens_trained", "Loss tokens trained on; of a step done again, once.")
        self._refused = self._counter("prompts_refused", "Prompts whose text was too old when its turn came.")
        self._seconds = Histogram(
            "potstill_run_step_seconds", METRICS["seconds_step"].phrase, buckets=SECONDS, registry=self.registry
        )
        self._stages = self._counter("stage_seconds", "What the loop waited for, by stage.", "stage")
        self._worker_stages = self._counter("worker_stage_seconds", "Work of all rollout workers, by stage.", "stage")
        self._gauges = {metric: self._gauge(name, METRICS[metric].phrase) for metric, name in GAUGES.items()}
        self._events = self._counter("events", "Events, by type and level.", "type", "level")
        self._counted = {kind: self._counter(*row) for kind, row in EVENTS.items()}
        self._alarms = self._counter("alarms", "Alarms that sounded, by name.", "alarm")
        self._status = Gauge("potstill_run_status", "1 for where the run stands.", ["status"], registry=self.registry)
        self._away = _Stopwatch("potstill_run_waiting_teacher_seconds", "Time in which the teacher was away.")
        self.registry.register(self._away)
        self._reached = {"step": 0.0, "tokens_trained": 0.0, "refused": 0.0}

    def __call__(self, kind: str, record: Mapping[str, Any]) -> None:
        """Take in a record of the journal."""
        {"metrics": self._step, "event": self._event, "status": self._stand}[kind](record)

    def _step(self, record: Mapping[str, Any]) -> None:
        for metric, gauge in self._gauges.items():
            value = number(record, metric)
            gauge.set(math.nan if value is None else value)
        for counter, metric in ((self._steps, "step"), (self._tokens, "tokens_trained")):
            reached = max(self._reached[metric], number(record, metric) or 0.0)
            counter.inc(reached - self._reached[metric])
            self._reached[metric] = reached
        refused, before = number(record, "refused") or 0.0, self._reached["refused"]
        self._refused.inc(refused - before if refused >= before else refused)  # after a recovery it begins at 0 again
        self._reached["refused"] = refused
        self._add_seconds(record)

    def _add_seconds(self, record: Mapping[str, Any]) -> None:
        for counter, prefix in ((self._stages, "seconds_"), (self._worker_stages, "worker_seconds_")):
            for name in record:
                value = number(record, name)
                if name.startswith(prefix) and name not in {"seconds_step", "seconds_total"} and value is not None:
                    counter.labels(name.removeprefix(prefix)).inc(value)
        seconds = number(record, "seconds_step")
        if seconds is not None:
            self._seconds.observe(seconds)

    def _event(self, record: Mapping[str, Any]) -> None:
        kind = record["type"]
        self._events.labels(kind, record["level"]).inc()
        if kind in self._counted:
            self._counted[kind].inc()
        if kind.startswith(ALARM):
            self._alarms.labels(kind.removeprefix(ALARM)).inc()

    def _stand(self, record: Mapping[str, Any]) -> None:
        for status in Status:
            self._status.labels(status.value).set(record["status"] == status)
        self._away.run(record["status"] == Status.WAITING_TEACHER)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"potstill_run_{name}", what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        gauge = Gauge(f"potstill_run_{name}", what, registry=self.registry)
        gauge.set(math.nan)
        return gauge


class _Stopwatch(Collector):
    """Seconds that something lasted, in all and up to now: a counter that grows while nobody touches it."""

    def __init__(self, name: str, what: str) -> None:
        self._name, self._what = name, what
        self._before, self._since = 0.0, time.monotonic()
        self._running = False

    def run(self, running: bool) -> None:
        self._before, self._since, self._running = self._seconds, time.monotonic(), running

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._what, value=self._seconds)

    @property
    def _seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._running else 0.0)


@contextlib.contextmanager
def exposed(journal: Journal, config: RunConfig) -> Iterator[None]:
    """Serve the run's numbers as long as the block lasts, where loop.metrics_port is set.

    Raises ConfigError when the port is taken.
    """
    if config.loop.metrics_port is None:
        yield
        return
    exposition = Exposition(run=config.name, method=config.method, engine=config.rollout.engine)
    journal.listen(exposition)
    try:
        server, thread = start_http_server(config.loop.metrics_port, LOOPBACK, exposition.registry)
    except OSError as error:
        raise ConfigError(
            f"loop.metrics_port = {config.loop.metrics_port} cannot be listened on ({error.strerror}): choose another, "
            "or 0 for any free one"
        ) from error
    try:
        address = f"http://{LOOPBACK}:{server.server_port}/metrics"
        journal.event("metrics.served", f"Prometheus metrics at {address}", url=address)
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
