"""The service's own numbers for Prometheus, on a port of its own on loopback: requests, runs by state, streams.

Labels are route templates and states, never ids or names: what clients send does not become a time series.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.service.runs import State
from orchestrator.service.store import Store
from potstill.errors import ConfigError, ServiceError

LOOPBACK = "127.0.0.1"
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Measures:
    def __init__(self, store: Store) -> None:
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
        self.registry.register(_Runs(store))

    def install(self, app: FastAPI) -> None:
        app.add_middleware(_Counting, measures=self)

    @contextlib.contextmanager
    def served(self, port: int | None) -> Iterator[None]:
        """GET /metrics on loopback while the block lasts. Raises ConfigError for a port that is taken."""
        if port is None:
            yield
            return
        try:
            server, thread = start_http_server(port, addr=LOOPBACK, registry=self.registry)
        except OSError as error:
            raise ConfigError(f"--admin-port {port}: {error.strerror}") from None
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

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        runs = GaugeMetricFamily("potstill_runs", "Runs by state.", labels=["status"])
        up = GaugeMetricFamily("potstill_database_up", "1 while the database answers.")
        try:
            counts = self._store.runs.counts()
        except ServiceError:
            up.add_metric([], 0.0)
        else:
            up.add_metric([], 1.0)
            for state in State:
                runs.add_metric([state.value], float(counts[state]))
        yield runs
        yield up
