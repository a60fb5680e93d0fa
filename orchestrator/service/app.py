"""The service as one ASGI application: what passes before every route, the routes, and the supervisor beside them.

Refuses every /v1 request without a key (a run's own reports: without that run's token). What a refusal looks like is in
gate.py; who may ask for what in routes/asking.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI

import potstill
from orchestrator.service import dashboard, document, gate
from orchestrator.service.authentication import Authentication
from orchestrator.service.measures import Measures
from orchestrator.service.routes import (
    capabilities,
    checkpoints,
    events,
    files,
    fine_tuning,
    health,
    keys,
    logs,
    metrics,
    reports,
    runs,
    samples,
    score,
    teachers,
)
from orchestrator.service.state import ServiceState

ROUTERS = (
    health, runs, events, reports, metrics, logs, samples, checkpoints, files, teachers, score, capabilities, keys,
    fine_tuning,
)  # fmt: skip


def create_app(state: ServiceState, *, hosts: Iterable[str] = (), measures: Measures | None = None) -> FastAPI:
    """The service over one state; `hosts` are further names that it answers to; `measures` counts its answers."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        state.supervisor.start()
        try:
            yield
        finally:
            await asyncio.to_thread(state.supervisor.stop)
            await state.catalog.scorers.aclose()
            await state.store.database.leave_loop()

    app = FastAPI(
        title="potstill",
        version=potstill.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = state
    gate.install(app, hosts, Authentication(state.store, state.signer))
    if measures is not None:
        measures.install(app)
    for routes in ROUTERS:
        app.include_router(routes.router)
    dashboard.install(app)
    document.install(app)
    return app
