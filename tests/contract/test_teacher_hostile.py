"""Bodies made to hurt, and what a server that has seen a secret says of it: nothing, anywhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from potstill.codec import JSON, SAFETENSORS
from teacher_server.logs import without_values
from tests.builders_teacher import KEY
from tests.plain import PLAIN
from tests.tiny_models import save_tiny_model

BEARER = {"authorization": f"Bearer {KEY}"}
MIB = 2**20
CANARY = "canary-7f3a91"
QUICK_S = 1.0  # of the server's CPU time, for a refusal
RSS_BYTES = 150 * MIB


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    errors: Path

    @property
    def rss(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def post(self, body: bytes, path: str = "score", **headers: str) -> httpx2.Response:
        given = {**BEARER, "content-type": JSON, **headers}
        return httpx2.post(
            f"{self.url}/v1/{path}", content=body, headers=given, timeout=30, trust_env=False, verify=PLAIN
        )

    def raw(self, *lines: str, body: bytes = b"") -> bytes:
        host, port = self.url.removeprefix("http://").split(":")
        head = "\r\n".join(["POST /v1/score HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *lines, "", ""])
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head.encode() + body)
            return connection.recv(65536)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python -m teacher_server`, with all that it writes kept."""
    root = tmp_path_factory.mktemp("hostile")
    model = save_tiny_model(root / "tiny", seed=3, layers=1)
    command = [sys.executable, "-m", "teacher_server", str(model), "--key-env", "TEACHER_KEY", "--accept-weights"]
    environment = {**os.environ, "TEACHER_KEY": KEY, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (root / "stderr").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        yield Server(json.loads(process.stdout.readline())["url"], process, root / "stderr")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ---------------------------------------------------------------------------------------------------------- bombs


def filled(before: bytes, unit: bytes, after: bytes = b"") -> bytes:
    """A body of just under 2 MiB, the most that JSON may have."""
    return before + unit * ((2 * MIB - len(before) - len(after)) // len(unit)) + after


def keys(number: int) -> bytes:
    return b"{" + b",".join(b'"k%d":0' % index for index in range(number)) + b"}"


IDS = b'{"model":"tiny","items":[{"id":"a","context_ids":[1],"completion_ids":['


@pytest.mark.parametrize("path", ["score", "completions"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(filled(b"", b"["), 400, id="deep arrays"),
        pytest.param(filled(b"", b'{"a":'), 413, id="deep objects"),
        pytest.param(filled(b'{"model":"tiny","items":', b"["), 400, id="deep items"),
        pytest.param(keys(150_000), 413, id="many keys"),
        pytest.param(filled(b'{"model":"tiny","seed":', b"9", b"}"), 400, id="huge number"),
        pytest.param(filled(IDS, b"9", b"]}]}"), 400, id="huge id"),
        pytest.param(filled(IDS, b'"a",', b"0]}]}"), 400, id="wrong ids"),
        pytest.param(filled(b'{"model":"tiny","prompt":[', b"null,", b"0]}"), 400, id="wrong prompt"),
        pytest.param(filled(b'{"model":"tiny","items":[', b"{},", b"{}]}"), 400, id="empty items"),
        pytest.param(filled(b"", b'"'), 400, id="quotes"),
        pytest.param(filled(b'"', b'\\"'), 400, id="an endless string"),
        pytest.param(b'{"model":"tiny","temperature":NaN,"items":[]}', 400, id="NaN"),
        pytest.param(b"\xff\xfe", 400, id="not UTF-8"),
        pytest.param(b" " * (2 * MIB + 1), 413, id="too long"),
    ],
)
def test_a_body_made_to_hurt_is_refused_at_once_in_bounded_memory(server, path, body, status):
    before, started = server.rss, server.cpu_s
    answer = server.post(body, path)
    assert (answer.status_code, answer.json()["error"]["retryable"]) == (status, False)
    assert server.cpu_s - started < QUICK_S
    assert server.rss - before < RSS_BYTES


def test_a_safetensors_header_of_a_million_keys_is_refused_at_once(server):
    header = keys(300_000)
    started = server.cpu_s
    answer = server.post(len(header).to_bytes(8, "little") + header, **{"content-type": SAFETENSORS})
    assert answer.status_code == 400
    assert server.cpu_s - started < QUICK_S


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_compressed_bodies_are_415(server, encoding):
    assert server.post(b"\x1f\x8b" * 100, **{"content-encoding": encoding}).status_code == 415


@pytest.mark.parametrize("length", ["abc", "-5", "1_000", "0x10", "1e3", "9" * 40, "+5"])
def test_a_malformed_content_length_is_400_or_413_and_never_a_crash(server, length):
    answer = server.raw(f"Content-Type: {JSON}", f"Content-Length: {length}", body=b"{}")
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))
    assert httpx2.get(f"{server.url}/livez", trust_env=False, verify=PLAIN).status_code == 200


def test_an_answer_too_large_for_json_is_413_and_fits_into_safetensors(server):
    items = [{"id": str(n), "context_ids": [1], "completion_ids": [5] * 200} for n in range(10)]
    body = json.dumps({"model": "tiny", "items": items, "top_k": 64}).encode()
    assert server.post(body).status_code == 413
    assert server.post(body, accept=SAFETENSORS).status_code == 200


# --------------------------------------------------------------------------------------------------------- canary


def asked(**changes: Any) -> bytes:
    message = {"role": "user", "content": f"the answer is {CANARY}"}
    item = {"id": "a", "completion_ids": [3, 4], "teacher_messages": [message]}
    return json.dumps({"model": "tiny", "items": [item | changes.pop("item", {})]} | changes).encode()


def test_a_privileged_context_is_in_no_log_no_error_and_no_metric(server):
    """The 200 itself carries numbers and the client's own ids; everything else is searched."""
    answers = [
        server.post(asked()),
        server.post(asked(expect_revision="r0")),
        server.post(asked(top_k=10**6)),
        server.post(asked(item={"completion_ids": [10**6]})),
        server.post(asked(item={"completion_ids": CANARY})),
        server.post(asked(item={"teacher_messages": CANARY})),
        server.post(asked(item={"teacher_messages": [{"role": CANARY, "content": CANARY, CANARY: 1}]})),
        server.post(asked(item={"teacher_messages": [{"role": "user", "content": CANARY * 100}]})),
        server.post(asked(seed=CANARY)),
        server.post(asked(deadline_ms=1, item={"id": "b"})),
        server.post(asked()[:-1]),
        server.post(asked(), **{"content-type": "text/plain"}),
        server.post(json.dumps({"model": CANARY, "prompt": CANARY, "max_tokens": 0}).encode(), "completions"),
        server.post(json.dumps({"model": "tiny", "prompt": CANARY * 100, "max_tokens": 0}).encode(), "completions"),
        server.post(json.dumps({"model": "tiny", "prompt": CANARY, "max_tokens": 9}).encode(), "completions"),
        server.post(json.dumps({"model": "tiny", "prompt": CANARY, "stop": CANARY}).encode(), "completions"),
        server.post(CANARY.encode(), "weights?version=1", **{"content-type": SAFETENSORS}),
        server.post(CANARY.encode(), f"weights?version={CANARY}", **{"content-type": SAFETENSORS}),
        httpx2.get(f"{server.url}/metrics", trust_env=False, verify=PLAIN),
        httpx2.get(f"{server.url}/{CANARY}", trust_env=False, verify=PLAIN),
    ]
    assert {answer.status_code for answer in answers} >= {200, 400, 404, 412, 415}
    assert max(answer.status_code for answer in answers) in {415, 504}
    for answer in answers:
        assert CANARY not in answer.text
        assert CANARY not in str(answer.headers)
    server.process.terminate()
    assert server.process.wait(timeout=20) == 0
    assert CANARY not in server.process.stdout.read()
    assert CANARY not in server.errors.read_text()
    assert KEY not in server.errors.read_text()


def test_an_error_is_logged_by_its_type_and_frames_without_its_text():
    try:
        raise RuntimeError(CANARY)
    except RuntimeError as error:
        event = without_values(None, "error", {"event": "batch.failed", "exc_info": error})
    assert event["error"] == "RuntimeError"
    assert event["frames"][0].startswith(__file__)
    assert CANARY not in json.dumps(event)
