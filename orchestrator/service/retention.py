"""What is removed by itself: checkpoints whose time is over, and what a killed service left half-removed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from orchestrator.service import confined
from orchestrator.service.artifacts import DOOMED, remove_checkpoint, remove_run, why_it_stays
from orchestrator.service.manifests import NAME
from orchestrator.service.runs import Run
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
    unfinished = store.runs.unfinished()
    for run_id, name in store.checkpoints.expired(time.time()):
        _expire(store, runs, store.runs.get(run_id), name, unfinished)


def _expire(store: Store, runs: Path, run: Run, name: str, unfinished: list[Run]) -> None:
    there = [found for found in confined.names(runs, run.id, "checkpoints") if NAME.fullmatch(found)]
    there.sort(key=lambda found: int(found.removeprefix("step-")))
    forks = [other for other in unfinished if other.forked_from == run.id]
    if why_it_stays(name, run, there, store.checkpoints.of_run(run.id), forks) is None:
        remove_checkpoint(store, runs, run.id, name)
        store.runs.remark(run.id, "checkpoint.expired", f"{name} is removed: its time is over", checkpoint=name)
        log.info("run %s: %s has expired", run.id, name)
