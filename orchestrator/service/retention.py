"""What is removed by itself: checkpoints whose time is over, and what a killed service left half-removed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from orchestrator.service import confined
from orchestrator.service.artifacts import DOOMED, remove_checkpoint, remove_run, why_it_stays
from orchestrator.service.store import Store
from potstill.durable import sweep

log = logging.getLogger(__name__)


def expire(store: Store, runs: Path) -> None:
    """One round. A checkpoint that somebody still needs outlives its time until nobody does.

    Raises Fenced when another service has taken over, ServiceError when the database is away.
    """
    sweep(runs)
    for run_id in confined.names(runs, DOOMED):
        if not store.runs.exists(run_id):
            remove_run(runs, run_id)
    for run_id, name in store.checkpoints.expired(time.time()):
        if why_it_stays(store, runs, store.runs.get(run_id), name) is None:
            remove_checkpoint(store, runs, run_id, name)
            store.runs.remark(run_id, "checkpoint.expired", f"{name} is removed: its time is over", checkpoint=name)
            log.info("run %s: %s has expired", run_id, name)
