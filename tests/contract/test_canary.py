"""Secrets that are known to the test are looked for in everything that the service says, writes, logs and keeps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from orchestrator.service.keys import Signer
from orchestrator.service.principals import Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from tests.plain import PLAIN
from tests.ports import free_port
from tests.service_configs import small_files, submitted
from tests.services import RUN, until

BY_VARIABLE, BY_FILE = "canary-4f9a1c7e-variable", "canary-4f9a1c7e-file"


@contextmanager
def service(folder: Path, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.launchers", str(folder), str(port), RUN]
    environment = {**os.environ, "POTSTILL_SECRET_CANARY": BY_VARIABLE}
    with (folder / "service.log").open("wb") as log, subprocess.Popen(command, stderr=log, env=environment) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def test_a_secret_is_nowhere(tmp_path: Path):
    small_files(tmp_path)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "teacher").write_text(BY_FILE)
    store = Store(Database(f"sqlite:///{tmp_path / 'potstill.db'}"))
    _, key = store.keys.create(owner="operator", label="", scopes=[Scope.ADMIN])
    port, closed = free_port(), free_port()
    said: list[str] = []
    with (
        service(tmp_path, port),
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=PLAIN, timeout=90.0) as http,
    ):
        until(lambda: _lives(http), 60.0)
        http.headers["authorization"] = f"Bearer {key}"
        for name, reference in (("variable", "env:POTSTILL_SECRET_CANARY"), ("file", "file:teacher")):
            table = {"kind": "server", "url": f"http://127.0.0.1:{closed}", "secret_ref": reference, "deadline_s": 1.0}
            made = http.post("/v1/teachers", json={"name": name, "teacher": table})
            probed = http.post(f"/v1/teachers/{name}/probe", json={})
            assert (made.status_code, probed.status_code // 100) == (201, 5), made.text
            said += [made.text, probed.text]
        said.append(http.post("/v1/runs", json=submitted()).text)
        until(lambda: http.get("/v1/runs/one").json()["status"] == "succeeded", 60.0)
        for refused in (BY_VARIABLE, key[:-1], f"{key}x"):
            said.append(http.get("/v1/runs", headers={"authorization": f"Bearer {refused}"}).text)
        token = Signer(b"test").token(store.runs.get("one").submission_id)
        said.append(http.get("/v1/runs", headers={"authorization": f"Bearer {token}"}).text)
        paths = http.get("/openapi.json").json()["paths"]
        for path in [path for path, methods in paths.items() if "get" in methods] + ["/", "/runs/one", "/teachers"]:
            answer = http.get(path.replace("{run_id}", "one").replace("{teacher_id}", "variable"))
            said.append(f"{answer.headers} {answer.text}")
    store.close()
    kept = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "secrets"]
    everything = "\n".join(said).encode() + b"\n".join(kept)
    assert (tmp_path / "service.log").read_bytes().count(b"\n") > 5, "the service has logged"
    for secret in (BY_VARIABLE, BY_FILE, key.split("_", 2)[2], token):
        place = re.search(re.escape(secret.encode()), everything)
        assert place is None, everything[max(0, place.start() - 200) : place.end() + 50]


def _lives(http: httpx2.Client) -> bool:
    try:
        return http.get("/livez").is_success
    except httpx2.TransportError:
        return False
