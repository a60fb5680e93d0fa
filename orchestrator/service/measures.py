"""The service's own numbers for Prometheus, on a port of its own: requests, runs by state, and of each run that has
processes what it reported last, under the names that the run itself serves (orchestrator/exposition.py).

Labels are route templates, states, names of our own code, and the ids of runs at work, which are a few letters each and
go when the run ends: nothing else that clients send becomes a time series. What was not measured is NaN.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.exposition import ALARM, GAUGES
from orchestrator.service.runs import Run
from orchestrator.service.store import Store
from potstill.errors import ConfigError, ServiceError
from potstill.metrics import METRICS, number

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
STAGES = {"seconds_": "last_stage_seconds", "worker_seconds_": "last_worker_stage_seconds"}  # by a metric's beginning
WHOLE = {"seconds_step", "seconds_total"}  # which are no stages


class Measures:
    """`cluster_up` is asked at every scrape."""

    def __init__(self, store: Store, cluster_up: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "potstill_api_requests",
            "Answers by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "potstill_api_request_seconds",
            "From a request to the beginning of its answer.",
            ["method", "route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Runs(store, cluster_up))

    def install(self, app: FastAPI) -> None:
        app.add_middleware(_Counting, measures=self)

    @contextlib.contextmanager
    def served(self, host: str, port: int | None) -> Iterator[None]:
        """GET /metrics while the block lasts, without a key. Raises ConfigError for a port that is taken."""
        if port is None:
            yield
            return
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise ConfigError(f"--admin-host {host} --admin-port {port}: {error.strerror}") from None
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


class _Counting:
    """ASGI middleware. A route's template is known when its answer begins."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self._app = app
        self._measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._measures.requests.labels(scope["method"], route, message["status"]).inc()
                self._measures.seconds.labels(scope["method"], route).observe(time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, counted)


class _Runs(Collector):
    """Asked at every scrape."""

    def __init__(self, store: Store, cluster_up: Callable[[], bool]) -> None:
        self._store = store
        self._cluster_up = cluster_up
        self._alarms: dict[str, tuple[int, Tally[str]]] = {}  # by run at work: alarms up to which event

    def collect(self) -> Iterator[Metric]:
        try:
            counts = self._store.runs.counts()
            working = self._store.runs.steered(())
            self._alarms = {run.id: self._alarms_of(run.id) for run in working}
        except ServiceError:
            counts, working = None, []
        yield GaugeMetricFamily("potstill_cluster_up", "1 while the cluster answers.", float(self._cluster_up()))
        yield GaugeMetricFamily("potstill_database_up", "1 while the database answers.", float(counts is not None))
        states = GaugeMetricFamily("potstill_runs", "Runs by state.", labels=["status"])
        for state, count in (counts or {}).items():
            states.add_metric([state.value], float(count))
        yield states
        yield from _last_step(working)
        yield from _used(working)
        alarms = CounterMetricFamily("potstill_run_alarms", "Alarms that sounded.", labels=["run", "alarm"])
        for run in working:
            for alarm, count in self._alarms[run.id][1].items():
                alarms.add_metric([run.id, alarm], float(count))
        yield alarms

    def _alarms_of(self, run_id: str) -> tuple[int, Tally[str]]:
        """Only what is new since the last scrape is read."""
        before, tally = self._alarms.get(run_id, (0, Tally()))
        last, kinds = self._store.events.typed(run_id, ALARM, after=before)
        return last, tally + Tally(kind.removeprefix(ALARM) for kind in kinds)


def _last_step(runs: Sequence[Run]) -> Iterator[Metric]:
    """The numbers of each run's last step."""
    yield _of_runs("step", METRICS["step"].phrase, [(run, float(run.step)) for run in runs])
    for metric, name in {**GAUGES, "seconds_step": "last_step_seconds"}.items():
        yield _of_runs(name, METRICS[metric].phrase, [(run, _number(run, metric)) for run in runs])
    for prefix, name in STAGES.items():
        stages = GaugeMetricFamily(f"potstill_run_{name}", "Of the last step, by stage.", labels=["run", "stage"])
        for run in runs:
            for metric in run.latest:
                if metric.startswith(prefix) and metric not in WHOLE:
                    stages.add_metric([run.id, metric.removeprefix(prefix)], _number(run, metric))
        yield stages


def _used(runs: Sequence[Run]) -> Iterator[Metric]:
    now = time.time()
    silent = [(run, math.nan if run.heartbeat_at is None else now - run.heartbeat_at) for run in runs]
    yield _of_runs("silent_seconds", "Since the run was heard of.", silent)
    for name, what, used in (
        ("teacher_tokens", "Tokens of black-box teachers.", [float(run.teacher_tokens) for run in runs]),
        ("teacher_usd", "What black-box teachers have cost, by the config's prices.", [r.teacher_usd for r in runs]),
    ):
        total = CounterMetricFamily(f"potstill_run_{name}", what, labels=["run"])
        for run, value in zip(runs, used, strict=True):
            total.add_metric([run.id], value)
        yield total


def _number(run: Run, metric: str) -> float:
    value = number(run.latest, metric)
    return math.nan if value is None else value


def _of_runs(name: str, what: str, values: Sequence[tuple[Run, float]]) -> Metric:
    family = GaugeMetricFamily(f"potstill_run_{name}", what, labels=["run"])
    for run, value in values:
        family.add_metric([run.id], value)
    return family
