"""What needs no key: whether the process lives, whether the service can work, and its version."""

from __future__ import annotations

from fastapi import APIRouter

import potstill
from orchestrator.service.routes.asking import State
from potstill.errors import ServiceError

router = APIRouter(tags=["health"])


@router.get("/livez", operation_id="live")
def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", operation_id="ready")
def ready(state: State) -> dict[str, str]:
    """The database and the cluster answer too; 503 otherwise."""
    state.store.ping()
    if not state.supervisor.healthy:
        raise ServiceError(state.supervisor.problem or "the supervisor of runs has ended", 503, "cluster_unavailable")
    return {"status": "ok"}


@router.get("/version", operation_id="version")
def version() -> dict[str, str]:
    return {"version": potstill.__version__}
