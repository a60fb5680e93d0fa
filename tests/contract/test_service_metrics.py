"""What Prometheus scrapes of a service: its requests, its runs by state, and the last numbers of those at work."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.service.runs import State
from potstill.errors import ConfigError
from tests.launchers import AwayLauncher
from tests.left_behind import begin
from tests.plain import PLAIN
from tests.ports import free_port
from tests.services import Service, serving

STEP = {"reverse_kl": 0.25, "seconds_train": 1.5, "worker_seconds_score": 0.75, "seconds_step": 2.0, "loss": None}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("metrics"), lambda _url: AwayLauncher()) as running:
        yield running


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(service: Service) -> Samples:
    port = free_port()
    with service.measures.served("127.0.0.1", port):
        text = httpx2.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, verify=PLAIN).text
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"potstill_{name}", frozenset(labels.items())]


def report(service: Service, run: str, **logs: list[dict[str, object]]) -> None:
    token = service.state.signer.token(service.store.runs.get(run).submission_id)
    headers = {"Authorization": f"Bearer {token}"}
    service.http.post(f"/v1/runs/{run}/events", json=logs, headers=headers).raise_for_status()


def alarm(seq: int, name: str) -> dict[str, object]:
    return {"seq": seq, "time": 1.0, "type": f"alarm.{name}", "level": "warning", "message": "it sounded", "data": {}}


def test_the_last_step_of_a_run_at_work_is_there_under_the_names_that_the_run_itself_serves(service: Service):
    begin(service, "works", state=State.RUNNING)
    begin(service, "done", state=State.SUCCEEDED)
    service.store.runs.spent("works", teacher_tokens=1200, teacher_usd=0.5)
    steps = [{"seq": 1, "time": time.time(), "step": 7, **STEP}]
    report(service, "works", metrics=steps, events=[alarm(1, "length"), alarm(2, "length")])
    samples = scraped(service)
    assert of(samples, "run_step", run="works") == 7
    assert of(samples, "run_reverse_kl_nats", run="works") == 0.25
    assert math.isnan(of(samples, "run_loss_nats", run="works"))
    assert math.isnan(of(samples, "run_entropy_nats", run="works"))
    assert of(samples, "run_last_step_seconds", run="works") == 2.0
    assert of(samples, "run_last_stage_seconds", run="works", stage="train") == 1.5
    assert of(samples, "run_last_worker_stage_seconds", run="works", stage="score") == 0.75
    assert of(samples, "run_teacher_tokens_total", run="works") == 1200
    assert of(samples, "run_teacher_usd_total", run="works") == 0.5
    assert 0 <= of(samples, "run_silent_seconds", run="works") < 60
    assert not any(("run", "done") in labels for _, labels in samples)

    report(service, "works", events=[alarm(3, "entropy"), alarm(2, "length")])  # the second one again
    samples = scraped(service)
    assert of(samples, "run_alarms_total", run="works", alarm="length") == 2
    assert of(samples, "run_alarms_total", run="works", alarm="entropy") == 1


def test_requests_are_counted_by_route_and_runs_by_state(service: Service):
    begin(service, "counted", state=State.FAILED)
    before = scraped(service)
    service.http.get("/v1/runs/counted")
    service.http.get("/v1/runs/nobody")
    after = scraped(service)
    for status in ("200", "404"):
        labels = {"method": "GET", "route": "/v1/runs/{run_id}", "status": status}
        key = ("potstill_api_requests_total", frozenset(labels.items()))
        assert after[key] == before.get(key, 0.0) + 1
    assert of(after, "runs", status="failed") == service.store.runs.counts()[State.FAILED]
    assert of(after, "runs", status="recovering") == 0
    assert of(after, "database_up") == 1
    assert of(after, "cluster_up") == 0  # the launcher's is away


def test_a_run_that_was_never_heard_of_is_silent_for_no_known_time(service: Service):
    begin(service, "silent", state=State.STARTING)
    samples = scraped(service)
    assert math.isnan(of(samples, "run_silent_seconds", run="silent"))
    assert of(samples, "run_step", run="silent") == 0


def test_a_port_that_is_taken_is_refused(service: Service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"--admin-host 127.0.0.1 --admin-port {port}: Address already in use"),
            service.measures.served("127.0.0.1", port),
        ):
            pass
