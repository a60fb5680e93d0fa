"""What a key may use is a hard stop: at submission, in the queue, and while its runs are at work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.service.principals import Scope
from tests.launchers import ProcessLauncher
from tests.service_configs import submitted
from tests.services import RUN, Service, serving, until

BOTH = (Scope.RUNS_READ, Scope.RUNS_WRITE)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, lambda url: ProcessLauncher(folder / "jobs", RUN, url)) as running:
        yield running


def status(service: Service, name: str) -> str:
    return service.http.get(f"/v1/runs/{name}").json()["status"]


def spend(service: Service, name: str, tokens: int) -> None:
    """What a worker of the run writes when a black box has answered."""
    counted = {"requests": 1, "tokens_in": tokens, "tokens_out": 0, "cost_pico_usd": 0}
    (service.folder / "runs" / name / "spent-teacher-0.json").write_text(json.dumps(counted))


def test_a_run_that_uses_up_its_keys_budget_is_paused_and_goes_on_when_it_is_raised(service: Service):
    with service.asking(service.key_for("carol", *BOTH, teacher_tokens=100)) as carol:
        assert carol.post("/v1/runs", json=submitted(name="costly", seed=2)).status_code == 201
        until(lambda: status(service, "costly") == "running")
        spend(service, "costly", 99)
        until(lambda: carol.get("/v1/runs/costly").json()["usage"]["teacher_tokens"] == 99)
        assert status(service, "costly") == "running"
        spend(service, "costly", 100)
        until(lambda: status(service, "costly") == "paused")
        refused = carol.post("/v1/runs", json=submitted(name="more"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
        assert "teacher_tokens" in refused.json()["error"]["message"]
        key_id = carol.get("/v1/me").json()["id"]
        raised = service.http.patch(f"/v1/keys/{key_id}", json={"limits": {"teacher_tokens": 500}})
        assert raised.json()["limits"]["teacher_tokens"] == 500
        assert carol.post("/v1/runs/costly/resume", json={}).status_code == 202
        until(lambda: status(service, "costly") == "running")
        assert carol.get("/v1/runs/costly").json()["attempt"] == 2
        assert carol.post("/v1/runs/costly/cancel", json={}).status_code == 202
        until(lambda: status(service, "costly") == "cancelled")


def test_a_key_runs_as_many_as_it_may_and_the_others_wait(service: Service):
    with service.asking(service.key_for("dave", *BOTH, running=1)) as dave:
        for name in ("first", "second"):
            dave.post("/v1/runs", json=submitted(name=name, seed=2))
        until(lambda: status(service, "first") == "running")
        service.http.post("/v1/runs", json=submitted(name="somebody-elses", seed=0))
        until(lambda: status(service, "somebody-elses") == "succeeded")
        assert status(service, "second") == "queued"
        dave.post("/v1/runs/first/cancel", json={})
        until(lambda: status(service, "second") == "running")
        dave.post("/v1/runs/second/cancel", json={})
        until(lambda: status(service, "second") == "cancelled")


def test_fifty_submissions_at_once_do_not_cross_a_limit(service: Service):
    with service.asking(service.key_for("erin", *BOTH, runs=5)) as erin, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> int:
            return erin.post("/v1/runs", json=submitted(name=f"race-{number}")).status_code

        codes = list(pool.map(ask, range(50)))
    assert (codes.count(201), codes.count(429)) == (5, 45)


def test_the_queue_is_by_priority(tmp_path: Path):
    with serving(tmp_path, lambda url: ProcessLauncher(tmp_path / "jobs", RUN, url), slots=1) as service:
        service.http.post("/v1/runs", json=submitted(name="busy", seed=2))
        until(lambda: status(service, "busy") == "running")
        for name, priority in (("low", -5), ("high", 5)):
            service.http.post("/v1/runs", json=submitted(name=name, seed=2) | {"priority": priority})
        etag = service.http.get("/v1/runs/low").headers["etag"]
        changed = service.http.patch("/v1/runs/low", json={"priority": 9}, headers={"If-Match": etag})
        assert changed.json()["priority"] == 9
        service.http.post("/v1/runs/busy/cancel", json={})
        until(lambda: status(service, "low") == "running")
        assert status(service, "high") == "queued"
        for name in ("high", "low"):
            service.http.post(f"/v1/runs/{name}/cancel", json={})
        until(lambda: status(service, "low") == "cancelled")
