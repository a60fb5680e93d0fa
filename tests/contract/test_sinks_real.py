"""The real clients of wandb, mlflow and trackio, offline or on loopback, each as a run has it: in its own process."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from wandb.proto.wandb_internal_pb2 import Record

from potstill.journal import Journal, Status, read_jsonl
from potstill.sinks.opening import Ready
from potstill.sinks.process import ProcessSink
from tests.apart import answer_of, python_with
from tests.sinks import CANARY, running, tell, wait_until

CLOSE_S = 60.0
KEY = CANARY * 3  # as long as a real one


def made(kind: str, python: str, settings: dict[str, Any], **options: Any) -> list[Ready]:
    """The sink as `ready` makes it, with the client of another Python."""
    sink = ProcessSink(kind, settings, command=(python, "-P", "-m", "potstill.sinks"), **options)
    return [Ready(name=kind, sink=sink, abandon=sink.kill)]


def first_part(journal: Journal) -> None:
    journal.event("run.started", "opd on jsonl", steps=3)
    journal.metrics(1, {"loss": 4.0, "accuracy": float("nan")})
    journal.metrics(2, {"loss": 2.0, "accuracy": 0.5})
    journal.event("alarm.length", "answers grow", level="warn")


def second_part(journal: Journal) -> None:
    """From the checkpoint of step 1: the second step is done again."""
    journal.event("run.resumed", "going on from step 1", step=1, kept=0)
    journal.metrics(2, {"loss": 3.0, "accuracy": 0.25})
    journal.metrics(3, {"loss": 1.0, "accuracy": 0.75})
    journal.event("run.finished", "the run is complete", student_after=0.75)
    journal.status(Status.SUCCEEDED)


def troubles(folder: Path) -> list[str]:
    return [e["message"] for e in read_jsonl(folder / "events.jsonl") if e["type"].startswith("sink.")]


def holding(folder: Path, secret: str) -> list[str]:
    """Files in which the secret stands, as it is or as HTTP's basic authorization writes it."""
    forms = (secret.encode(), base64.b64encode(f"api:{secret}".encode()))
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path.relative_to(folder)) for path in files if any(form in path.read_bytes() for form in forms)]


@contextmanager
def refusing_server() -> Iterator[tuple[str, list[str]]]:
    """A server on loopback that lets nobody in; its URL, and the Authorization headers that it has seen."""
    seen: list[str] = []

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def processes_at_home_in(folder: Path) -> list[str]:
    """What still works for a sink of the run in `folder`, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HOME", "").startswith(str(folder)) and running(process.pid):
                found.append(process.name())
    return found


# --------------------------------------------------------------------------------------------------- Weights & Biases


def wandb_settings(**changes: Any) -> dict[str, Any]:
    return {"project": "p", "entity": None, "mode": "offline", "url": None, "close_s": CLOSE_S, **changes}


def records(file: Path) -> Iterator[Record]:
    """Of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    content = file.read_bytes()
    place, parts = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(file: Path) -> list[dict[str, float]]:
    """What was logged, in order."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(file)
        if record.HasField("history")
    ]


def test_wandb_offline_has_every_step_and_a_resumed_run_is_the_same_run(tmp_path: Path):
    for part, resume in ((first_part, False), (second_part, True)):
        sinks = made("wandb", sys.executable, wandb_settings())
        folder = tell(tmp_path, sinks, part, resume=resume, close_s=CLOSE_S)
    assert troubles(folder) == []
    first, second = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert first.name == second.name
    logged = [(row["step"], row["loss"], row.get("accuracy")) for file in (first, second) for row in history(file)]
    assert logged == [(1, 4.0, None), (2, 2.0, 0.5), (2, 3.0, 0.25), (3, 1.0, 0.75)]
    summary = {
        (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
        for record in records(second)
        for item in record.summary.update
    }
    assert summary.items() >= {"status": "succeeded", "student_after": 0.75, "resumed_from_step": 1}.items()
    (begun,) = [record.run for record in records(first) if record.HasField("run")]
    assert (begun.project, begun.display_name) == ("p", "told")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["optim"]["lr"] == 1e-3
    assert [record.alert.text for record in records(first) if record.HasField("alert")] == ["answers grow"]
    assert not (Path.home() / ".netrc").exists() or CANARY not in (Path.home() / ".netrc").read_text()


def test_wandb_with_a_server_that_lets_nobody_in_is_an_event_without_the_key(tmp_path: Path):
    with refusing_server() as (url, seen):
        sinks = made("wandb", sys.executable, wandb_settings(mode="online", url=url), secret=KEY)
        folder = tell(tmp_path, sinks, first_part, close_s=CLOSE_S)
    assert seen
    assert "error 401" in troubles(folder)[0]
    assert len(list(read_jsonl(folder / "metrics.jsonl"))) == 2
    assert holding(folder, KEY) == []


def test_wandb_with_a_server_that_never_answers_holds_nothing_up_and_leaves_no_process(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        sinks = made("wandb", sys.executable, wandb_settings(mode="online", url=url), secret=KEY)
        started = time.monotonic()
        folder = tell(tmp_path, sinks, first_part, close_s=5.0)
        assert time.monotonic() - started < 60
        assert "not done when the time for it was over" in troubles(folder)[0]
        wait_until(lambda: processes_at_home_in(folder) == [])
    assert holding(folder, KEY) == []


# --------------------------------------------------------------------------------------------------------------- MLflow

READ_MLFLOW = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
(run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
kept = {name: [(one.step, one.value) for one in values] for name, values in history.items()}
print(json.dumps([run.info.run_name, run.info.status, run.data.metrics, kept, run.data.params, run.data.tags]))
"""


def test_mlflow_has_every_step_and_a_resumed_run_is_the_same_run(tmp_path: Path):
    python, uri = python_with("mlflow-skinny"), f"file://{tmp_path / 'store'}"
    for part, resume in ((first_part, False), (second_part, True)):
        sinks = made("mlflow", python, {"tracking_uri": uri, "experiment": "e"})
        folder = tell(tmp_path, sinks, part, resume=resume, close_s=CLOSE_S)
    assert troubles(folder) == []
    name, status, latest, kept, parameters, tags = answer_of(python, READ_MLFLOW, uri, MLFLOW_ALLOW_FILE_STORE="true")
    assert (name, status) == ("told", "FINISHED")
    assert latest == {"loss": 1.0, "accuracy": 0.75, "student_after": 0.75}
    assert kept["loss"] == [[1, 4.0], [2, 2.0], [2, 3.0], [3, 1.0]]
    assert kept["accuracy"] == [[2, 0.5], [2, 0.25], [3, 0.75]]
    assert parameters.items() >= {"method": "opd", "optim.lr": "0.001", "loop.steps": "3"}.items()
    assert tags.items() >= {"event.alarm.length": "step 2: answers grow", "resumed_from_step": "1"}.items()


def test_mlflow_shows_its_token_to_its_server_alone(tmp_path: Path):
    with refusing_server() as (url, seen):
        settings = {"tracking_uri": url, "experiment": "e"}
        sinks = made("mlflow", python_with("mlflow-skinny"), settings, secret=CANARY)
        folder = tell(tmp_path, sinks, first_part, close_s=CLOSE_S)
    assert f"Bearer {CANARY}" in seen
    assert "401" in troubles(folder)[0]
    assert len(list(read_jsonl(folder / "metrics.jsonl"))) == 2
    assert holding(folder, CANARY) == []


# -------------------------------------------------------------------------------------------------------------- Trackio

READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_run_records("p")
logs = [{k: v for k, v in row.items() if k != "timestamp"} for row in SQLiteStorage.get_logs("p", run_id=run["id"])]
alerts = [(a["step"], a["level"], a["title"], a["text"]) for a in SQLiteStorage.get_alerts("p", run_id=run["id"])]
config = SQLiteStorage.get_run_config("p", run_id=run["id"])
print(json.dumps([run["name"], logs, sorted(alerts), config["optim"]["lr"]]))
"""


def test_trackio_has_every_step_and_a_resumed_run_is_the_same_run(tmp_path: Path):
    python, database = python_with("trackio"), str(tmp_path / "trackio")
    for part, resume in ((first_part, False), (second_part, True)):
        sinks = made("trackio", python, {"project": "p", "folder": database, "url": None})
        folder = tell(tmp_path, sinks, part, resume=resume, close_s=CLOSE_S)
    assert troubles(folder) == []
    name, logs, alerts, rate = answer_of(python, READ_TRACKIO, TRACKIO_DIR=database, HF_HUB_OFFLINE="1")
    assert (name, rate) == ("told", 1e-3)
    found = [(row["step"], row["loss"], row.get("accuracy")) for row in logs if "loss" in row]
    assert found == [(1, 4.0, None), (2, 2.0, 0.5), (2, 3.0, 0.25), (3, 1.0, 0.75)]
    assert [row["student_after"] for row in logs if "student_after" in row] == [0.75]
    assert alerts == [[1, "info", "run.resumed", "from step 1"], [2, "warn", "alarm.length", "answers grow"]]


SERVE_TRACKIO = """
import json, sys, trackio
_, url, _, _ = trackio.show(open_browser=False, block_thread=False, share=False)
print(json.dumps(url.rstrip("/")), flush=True)
sys.stdin.read()
"""


@contextmanager
def trackio_server(python: str, database: Path) -> Iterator[str]:
    """The URL of a Trackio server of one's own, which takes what comes with CANARY."""
    own = {"TRACKIO_DIR": str(database), "TRACKIO_WRITE_TOKEN": CANARY, "HF_HUB_OFFLINE": "1"}
    command, pipe = [python, "-c", SERVE_TRACKIO], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **own}) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield json.loads(next(line for line in server.stdout if line.startswith('"')))
        finally:
            server.stdin.close()


def test_trackio_tells_a_server_of_ones_own(tmp_path: Path):
    python, database = python_with("trackio"), tmp_path / "server"
    with trackio_server(python, database) as url:
        settings = {"project": "p", "folder": str(tmp_path / "here"), "url": url}
        folder = tell(tmp_path, made("trackio", python, settings, secret=CANARY), first_part, close_s=CLOSE_S)
        assert troubles(folder) == []
    name, logs, _, _ = answer_of(python, READ_TRACKIO, TRACKIO_DIR=str(database), HF_HUB_OFFLINE="1")
    assert (name, [(row["step"], row["loss"]) for row in logs]) == ("told", [(1, 4.0), (2, 2.0)])
    assert holding(folder, CANARY) == []
