"""A whole life over HTTP: submitted, watched, paused, resumed, forked, cancelled, downloaded, loaded.

By the command line, by curl, by the Python client and by OpenAI's; the run is `potstill run` as a Ray job, with a
teacher server, a rollout worker and a learner of its own. The run is the quickstart's distillation, of the models that
the quickstart prepares.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.service.head import start_or_adopt
from orchestrator.service.jobs import RayLauncher
from tests.quickstart_models import CHECKOUT, OPD, SHORT, STUDENT, TEACHER, shelf
from tests.services import Service, serving

QUICK = (*SHORT, "loop.steps=150", "rollout.prompts_per_step=2", "checkpoint.every=10")
PATIENCE_S = 400.0  # two runs start on the machine's cores while other tests use them


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["quick", "whole"])
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether preparations and distillation are the quickstart's to the last step, or of a few steps each."""
    return bool(request.param)


@pytest.fixture(scope="module")
def models(whole: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelf(CHECKOUT) if whole else shelf(tmp_path_factory.mktemp("prepared"), *SHORT)


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, record = tmp_path_factory.mktemp("life"), tmp_path_factory.mktemp("head") / "head.json"
    head = start_or_adopt(record)
    command = (sys.executable, "-m", "potstill", "run")
    try:
        with serving(
            folder,
            lambda url: RayLauncher(head.cluster, command=command, report_url=url, service="life"),
            models=(models,),
        ) as running:
            yield running
    finally:
        head.stop(record)


def cli(service: Service, *arguments: str) -> Any:
    environment = {**os.environ, "POTSTILL_URL": service.url, "POTSTILL_API_KEY": service.key}
    command = [sys.executable, "-m", "potstill", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def curl(service: Service, method: str, path: str) -> Any:
    headers = [f"Authorization: Bearer {service.key}", "Content-Type: application/json"]
    command = ["curl", "-sS", "-X", method, f"{service.url}{path}", "-d", "{}"]
    done = subprocess.run([*command, *(part for h in headers for part in ("-H", h))], capture_output=True, check=True)
    return json.loads(done.stdout)


@contextmanager
def curl_following(service: Service, path: str, out: Path) -> Iterator[None]:
    command = ["curl", "-sN", f"{service.url}{path}", "-H", f"Authorization: Bearer {service.key}"]
    with (
        out.open("wb") as file,
        subprocess.Popen([*command, "-H", "Accept: text/event-stream"], stdout=file) as process,
    ):
        try:
            yield
            process.wait(PATIENCE_S)
        finally:
            process.kill()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.2)
    return value


def has_begun(run: Mapping[str, Any]) -> bool:
    assert run["status"] not in {"failed", "cancelled"}, run["error"]
    return int(run["progress"]["step"]) >= 1


def check_told_once(stream: Path) -> None:
    """Every event of a run that has ended: none lost, none twice."""
    messages = stream.read_text().split("\n\n")
    seqs = [int(line[4:]) for message in messages for line in message.splitlines() if line.startswith("id: ")]
    assert seqs == list(range(1, len(seqs) + 1))
    assert any(message.startswith("event: end") for message in messages)


def logits(model: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(model)(torch.arange(16)[None]).logits


def test_a_whole_life(service: Service, models: Path, whole: bool, tmp_path: Path):
    changes = ["name=life", STUDENT, TEACHER, *(() if whole else QUICK)]
    fine_tuning = openai.OpenAI(api_key=service.key, base_url=f"{service.url}/v1").fine_tuning.jobs
    with service.client() as client:

        def step() -> int:
            return int(client.get_run("life")["progress"]["step"])

        submitted = cli(service, "submit", str(OPD), *changes)
        assert submitted["status"] == "queued"
        steps = submitted["progress"]["max_steps"]
        with curl_following(service, "/v1/runs/life/events", tmp_path / "events"):
            until(lambda: step() >= 5)
            assert fine_tuning.retrieve("life").status == "running"
            client.pause_run("life")
            until(lambda: client.get_run("life")["status"] == "paused")
            reached = step()
            assert 5 <= reached < steps
            assert curl(service, "POST", "/v1/runs/life/resume")["status"] == "queued"

            newest = cli(service, "checkpoints", "list", "life")["data"][-1]["id"]
            forked = cli(
                service, "fork", "life", "--name", "child", "--from", newest, "optim.lr=5e-5", "loop.steps=9000"
            )
            assert forked["forked_from"] == {"run": "life", "checkpoint": newest}
            until(lambda: has_begun(client.get_run("child")))
            assert fine_tuning.cancel("child").status in {"running", "cancelled"}
            until(lambda: fine_tuning.retrieve("child").status == "cancelled")

            assert client.wait("life")["status"] == "succeeded"
        assert client.get_run("life")["attempt"] == 2
        check_told_once(tmp_path / "events")
        assert [row["step"] for row in service.store.events.metrics("life")] == list(range(1, steps + 1))

        last = f"step-{steps:06d}"
        got = cli(service, "checkpoints", "get", "life", last, "--out", str(tmp_path / "got"))
    run = service.folder / "runs" / "life"
    after = logits(Path(got["folder"]) / "model")
    assert torch.equal(after, logits(run / "checkpoints" / last / "model"))
    assert not torch.equal(after, logits(models / "warm-student"))
    if whole:
        found = json.loads((run / "report.json").read_text())
        assert found["student_after"] > 2 * found["student_before"]
