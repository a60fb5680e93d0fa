"""What a run left behind, over real HTTP: metrics, logs, samples, and checkpoints that arrive as they were written."""

from __future__ import annotations

import csv
import io
import math
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from orchestrator.service.principals import Scope
from orchestrator.service.runs import State
from potstill.process_log import log_of
from tests.launchers import AwayLauncher, ProcessLauncher
from tests.left_behind import begin, error_of, report
from tests.opened import recorded
from tests.run_folders import HOSTILE, make_samples
from tests.service_configs import submitted
from tests.services import RUN, Service, serving


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Whose cluster is away, so that a test can leave behind what it wants."""
    with serving(tmp_path_factory.mktemp("artifacts"), lambda _url: AwayLauncher()) as running:
        yield running


@pytest.fixture
def working(tmp_path: Path) -> Iterator[Service]:
    """Whose runs are processes."""
    with serving(tmp_path, lambda url: ProcessLauncher(tmp_path / "jobs", RUN, url)) as running:
        yield running


# Metrics


def test_metrics_of_a_run_come_as_columns_with_null_for_what_was_not_measured(service: Service):
    begin(service, "measured", state=State.RUNNING)
    steps = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": None, "eval": 0.0}, {"step": 3, "loss": 0.5}]
    report(service, "measured", steps)
    report(service, "measured", [{"step": n, "loss": 9.0} for n in (1, 2, 3)])  # of numbers that have come already
    found = service.http.get("/v1/runs/measured/metrics").json()
    assert found == {
        "object": "metrics",
        "run": "measured",
        "steps": 3,
        "points": 3,
        "keys": ["eval", "loss"],
        "columns": {"step": [1, 2, 3], "eval": [None, 0.0, None], "loss": [1.5, None, 0.5]},
    }
    some = service.http.get("/v1/runs/measured/metrics", params={"keys": "eval,later", "after_step": 1}).json()
    assert some["columns"] == {"step": [2, 3], "eval": [0.0, None], "later": [None, None]}


def test_a_long_run_is_thinned_out_and_its_spike_is_there_in_every_format(service: Service):
    begin(service, "long", state=State.RUNNING)
    steps = [{"step": n, "loss": math.sin(n / 50), "noise": float(n % 7)} for n in range(1, 3001)]
    steps[1234]["loss"] = 1e6
    report(service, "long", steps)
    asked = {"max_points": 100}
    shown = service.http.get("/v1/runs/long/metrics", params=asked).json()
    assert (shown["steps"], shown["points"]) == (3000, len(shown["columns"]["step"]))
    assert shown["points"] <= 100
    assert shown["columns"]["loss"][shown["columns"]["step"].index(1235)] == 1e6

    answer = service.http.get("/v1/runs/long/metrics", params=asked | {"format": "csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [float(row["loss"]) for row in rows] == shown["columns"]["loss"]

    answer = service.http.get("/v1/runs/long/metrics", params=asked | {"format": "parquet"})
    assert "long-metrics.parquet" in answer.headers["content-disposition"]
    assert parquet.read_table(io.BytesIO(answer.content)).to_pydict() == shown["columns"]


@pytest.mark.parametrize("params", [{"max_points": 5001}, {"max_points": 0}, {"after_step": -1}, {"format": "xml"}])
def test_metrics_refuse_what_makes_no_sense(params: dict[str, Any], service: Service):
    assert service.http.get("/v1/runs/measured/metrics", params=params).status_code in {400, 404}


# Logs


def test_a_log_is_read_from_an_offset_by_range_and_by_its_last_lines(service: Service):
    folder = begin(service, "wordy", state=State.RUNNING)
    text = "".join(f"line {n} é\n" for n in range(1000)).encode()
    log_of(folder).parent.mkdir()
    log_of(folder).write_bytes(text)
    path = "/v1/runs/wordy/logs"
    whole = service.http.get(path)
    assert (whole.content, whole.headers["content-type"]) == (text, "text/plain; charset=utf-8")
    assert (whole.headers["x-next-offset"], whole.headers["x-log-size"]) == (str(len(text)), str(len(text)))
    assert service.http.get(path, params={"tail": 3}).text.splitlines() == [f"line {n} é" for n in (997, 998, 999)]
    assert service.http.get(path, params={"offset": 500}).content == text[500:]
    part = service.http.get(path, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, text[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(text)}"
    for asked in ({"params": {"offset": len(text) + 1}}, {"headers": {"Range": "bytes=0-1,3-4"}}):
        refused = service.http.get(path, **asked)
        assert error_of(refused) == (416, "range_not_satisfiable")
        assert refused.headers["content-range"] == f"bytes */{len(text)}"
    assert error_of(service.http.get(path, params={"offset": 0, "tail": 1}))[0] == 400


def test_a_log_is_followed_by_asking_again_until_it_is_complete(service: Service):
    folder = begin(service, "growing", state=State.RUNNING)
    log_of(folder).parent.mkdir()
    words, seen, offset = "Grüße 👩‍🚀\n".encode(), b"", 0
    for end in [*range(1, len(words)), len(words)]:
        log_of(folder).write_bytes(words[:end])
        answer = service.http.get("/v1/runs/growing/logs", params={"offset": offset})
        assert answer.headers["x-log-complete"] == "false"
        answer.content.decode()  # never half a character
        seen, offset = seen + answer.content, int(answer.headers["x-next-offset"])
    assert seen == words
    service.store.runs.move("growing", State.SUCCEEDED, "it is done")
    last = service.http.get("/v1/runs/growing/logs", params={"offset": offset})
    assert (last.status_code, last.content, last.headers["x-log-complete"]) == (200, b"", "true")


def test_what_would_steer_a_terminal_is_neutralised(service: Service):
    folder = begin(service, "rude")
    log_of(folder).parent.mkdir()
    log_of(folder).write_bytes(b"\x1b[2J\x1b]0;owned\x07\xe2\x80\xaegpj.exe\r\nok\x9b31m\n")
    found = service.http.get("/v1/runs/rude/logs").content
    assert found == b"?[2J?]0;owned????gpj.exe \nok?31m\n"
    assert service.http.get("/v1/runs/rude/logs", headers={"Range": "bytes=4-9"}).content == found[4:10]


def test_each_role_has_its_log_and_one_that_is_not_there_names_those_that_are(service: Service):
    folder = begin(service, "many")
    for who in ("orchestrator", "learner-0", "learner-11", "rollout-3"):
        log_of(folder, who).parent.mkdir(exist_ok=True)
        log_of(folder, who).write_text(f"I am {who}\n")
    (folder / "teacher.log").write_text("I am the teacher\n")
    (folder / "secrets.log").write_text("nobody's\n")
    wrote = {("learner", 11): "learner-11", ("rollout", 3): "rollout-3", ("teacher", 0): "the teacher"}
    for (role, rank), who in wrote.items():
        answer = service.http.get("/v1/runs/many/logs", params={"role": role, "rank": rank})
        assert answer.text == f"I am {who}\n"
    missing = service.http.get("/v1/runs/many/logs", params={"role": "learner", "rank": 1})
    assert error_of(missing) == (404, "log_not_found")
    assert "orchestrator 0, learner 0, learner 11, rollout 3, teacher 0" in missing.json()["error"]["message"]
    assert error_of(service.http.get("/v1/runs/many/logs", params={"role": "../secrets"}))[0] == 400


def test_what_a_runs_process_writes_is_in_its_log_attempt_after_attempt(working: Service):
    with working.client() as client:
        client.create_run(submitted(name="silent", seed=3))
        run = client.wait("silent", poll_s=0.05)
    assert run["status"] == "failed"
    assert "the last words of this process" in run["error"]["log_tail"]
    text = working.http.get("/v1/runs/silent/logs").text
    assert text.startswith("── attempt 1, ")
    assert text.count("the last words of this process") == text.count("── attempt") == run["attempt"]


# Samples


def test_samples_come_newest_first_by_step_and_in_pages(service: Service):
    make_samples(begin(service, "sampled"), {1: 4, 40: 4, 80: 2})
    path = "/v1/runs/sampled/samples"
    whole = service.http.get(path).json()
    assert [sample["id"] for sample in whole["data"][:3]] == ["80-0", "80-1", "40-0"]
    assert (whole["steps"], whole["has_more"]) == ([1, 40, 80], False)
    paged = service.http.get(path, params={"limit": 3}).json()
    rest = service.http.get(path, params={"limit": 100, "after": paged["last_id"]}).json()
    assert paged["has_more"]
    assert paged["data"] + rest["data"] == whole["data"]
    assert [sample["step"] for sample in service.http.get(path, params={"step": 40}).json()["data"]] == [40] * 4
    token = whole["data"][0]["tokens"][0]
    assert (token["text"], token["teacher_logprob"], token["version"], token["trained"]) == (" 21", None, 79, True)
    assert error_of(service.http.get(path, params={"after": "nothing"})) == (400, "bad_cursor")


def test_what_only_a_teacher_was_shown_needs_its_scope(service: Service):
    reader = service.key_for("operator", Scope.RUNS_READ)
    seer = service.key_for("operator", Scope.RUNS_READ, Scope.SAMPLES_PRIVILEGED)
    make_samples(begin(service, "privileged"), {1: 1}, teacher_prompt="CANARY")
    for key, sees in ((reader, False), (seer, True), (service.key, True)):
        with service.asking(key) as asking:
            assert ("CANARY" in asking.get("/v1/runs/privileged/samples").text) is sees


# Who may, and by which names


def test_another_owners_artifacts_do_not_exist_and_a_reader_changes_nothing(service: Service):
    begin(service, "private", steps=(1,))
    reader = service.key_for("operator", Scope.RUNS_READ)
    stranger = service.key_for("somebody", Scope.RUNS_READ, Scope.RUNS_WRITE)
    one = "/v1/runs/private/checkpoints/step-000001"
    reads = ["metrics", "logs", "samples", "checkpoints", "checkpoints/step-000001"]
    changes = [("put", f"{one}/ttl", {"seconds": 1}), ("post", f"{one}/publish", {"name": "x"})]
    with service.asking(stranger) as asking:
        for path in reads:
            assert error_of(asking.get(f"/v1/runs/private/{path}")) == (404, "run_not_found")
        assert error_of(asking.get(f"{one}/files/model/config.json")) == (404, "run_not_found")
        for method, path, body in changes:
            assert error_of(asking.request(method, path, json=body)) == (404, "run_not_found")
        for path in (one, f"{one}/publish"):
            assert error_of(asking.delete(path)) == (404, "run_not_found")
    with service.asking(reader) as asking:
        assert asking.get(one).status_code == 200
        for method, path, body in changes:
            assert error_of(asking.request(method, path, json=body)) == (403, "missing_scope")
        for path in (one, f"{one}/publish"):
            assert error_of(asking.delete(path)) == (403, "missing_scope")


@pytest.mark.parametrize("hostile", [name for name in HOSTILE if name.isascii()], ids=lambda name: ascii(name)[:30])
def test_a_hostile_name_opens_nothing_outside_the_run(hostile: str, service: Service):
    """Sent as it is, and percent-encoded once and twice, in the place of a run, a checkpoint and a file."""
    if not service.store.runs.exists("hostile"):
        begin(service, "hostile", steps=(1,))
    once = "".join(f"%{byte:02x}" for byte in hostile.encode())
    sent = {once, once.replace("%", "%25")} | ({hostile} if hostile.isprintable() and " " not in hostile else set())
    places = (
        "/v1/runs/{}/checkpoints",
        "/v1/runs/{}/logs",
        "/v1/runs/hostile/checkpoints/{}",
        "/v1/runs/hostile/checkpoints/{}/files/model/config.json",
        "/v1/runs/hostile/checkpoints/step-000001/files/{}",
    )
    with recorded() as opened:
        for target in (place.format(name) for place in places for name in sent):
            assert raw_status(service, target) in {200, 307, 400, 404, 405}, target
    source = str(Path(__file__).parents[2])  # FastAPI reads where a route is written when it is asked first
    ours = (str(service.folder), source, sys.prefix, sys.base_prefix)
    assert [name for name, _ in opened if name.startswith("/") and not name.startswith(ours)] == []
    assert all(flags & os.O_NOFOLLOW for name, flags in opened if not name.startswith("/"))


def raw_status(service: Service, target: str) -> int:
    """Of a request whose target no client has cleaned up."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        lines = (f"GET {target} HTTP/1.1", f"Host: {host}:{port}", f"Authorization: Bearer {service.key}")
        wire.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))
        return int(wire.makefile("rb").readline().split()[1])
