"""Runs that a service knows and that have left something behind, without a process that ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2

from orchestrator.service.runs import State
from tests.run_folders import make_checkpoint
from tests.service_configs import submitted
from tests.services import Service


def begin(service: Service, name: str, *, state: State = State.SUCCEEDED, steps: tuple[int, ...] = ()) -> Path:
    """A run in that state that has saved these steps; its folder."""
    service.http.post("/v1/runs", json=submitted(name=name)).raise_for_status()
    if state is not State.QUEUED:
        service.store.runs.move(name, state, "as the test wants it")
    folder = service.state.runs / name
    folder.mkdir(exist_ok=True)
    for step in steps:
        make_checkpoint(folder, step)
    return folder


def report(service: Service, name: str, steps: list[dict[str, Any]]) -> None:
    """As the run's present job would."""
    token = service.state.signer.token(service.store.runs.get(name).submission_id)
    for start in range(0, len(steps), 200):
        rows = [{"seq": seq, "time": 1.0, **step} for seq, step in enumerate(steps[start : start + 200], start + 1)]
        headers = {"Authorization": f"Bearer {token}"}
        service.http.post(f"/v1/runs/{name}/events", json={"metrics": rows}, headers=headers).raise_for_status()


def error_of(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]
