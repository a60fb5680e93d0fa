"""Bodies that are meant to hurt, sent to a service that is a process of its own: refused soon, and without its memory.

Memory is the process's high-water mark; what one refusal may raise it by is bounded by what a body may hold. Names that
are meant for whoever reads the log are in its lines as text, one line an event.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from orchestrator.service.bodies import MAX_BODY_BYTES
from orchestrator.service.principals import Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from tests.plain import PLAIN
from tests.ports import free_port
from tests.service_configs import small_files, submitted
from tests.services import until

MEMORY = 192 << 20  # that all of it together may raise the high-water mark by: a few bodies of 4 MiB, taken apart
SOON_S = 20.0  # for one refusal on a busy machine; a parser that is being hurt takes minutes
LARGEST_ANSWER = 64 << 10
ESCAPE = "\x1b[31mred\x1b[0m"
FORGED = 'a"}\n{"event": "forged"}'

SERVE = """
import sys
from orchestrator.service import logs
from tests import launchers
logs.start()
launchers.main()
"""


@dataclass(frozen=True, kw_only=True)
class Target:
    process: subprocess.Popen[bytes]
    log: Path
    http: httpx2.Client
    address: tuple[str, int]

    def peak(self) -> int:
        """The most memory that the process has ever had, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]

    def post(self, content: bytes, path: str = "/v1/runs", **headers: str) -> httpx2.Response:
        """Answered soon, and with little."""
        kind = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        started = time.monotonic()
        response = self.http.post(path, content=content, headers=kind)
        assert time.monotonic() - started < SOON_S
        assert len(response.content) < LARGEST_ANSWER
        return response


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("hostile")
    small_files(folder)
    store = Store(Database(f"sqlite:///{folder / 'potstill.db'}"))
    _, key = store.keys.create(owner="operator", label="", scopes=[Scope.ADMIN])
    store.close()
    port, log = free_port(), folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(folder), str(port), "true"], stderr=file)
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(
        base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, verify=PLAIN, timeout=120.0
    ) as http:
        until(lambda: _answers(http), timeout_s=60.0)
        yield Target(process=process, log=log, http=http, address=("127.0.0.1", port))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _answers(http: httpx2.Client) -> bool:
    try:
        return http.get("/livez").is_success
    except httpx2.TransportError:
        return False


def filled(prefix: str, one: str, suffix: str = "}") -> bytes:
    """As many of `one`, in which {n} is a number, as fit into a body."""
    parts, length, number = [prefix], len(prefix) + len(suffix), 0
    while length + len(part := one.format(n=number)) + 1 < MAX_BODY_BYTES:
        parts.append(part if number == 0 else f",{part}")
        length, number = length + len(part) + 1, number + 1
    return ("".join(parts) + suffix).encode()


def within(field: str, value: str) -> bytes:
    """A run that is well but for one setting, written as JSON text."""
    return json.dumps(submitted() | {field: "HERE"}).replace('"HERE"', value).encode()


BODIES: dict[str, bytes] = {
    "nesting without end": b"[" * 1_000_000,
    "objects without end": b'{"a":' * 500_000,
    "nesting within a setting": within("data", "[" * 100_000 + "]" * 100_000),
    "a number without end": within("seed", "9" * 1_000_000),
    "a number of four thousand digits": within("seed", "9" * 4000),
    "not a number": within("seed", "NaN"),
    "endless": within("optim", '{"lr": Infinity}'),
    "a number beyond floats": within("optim", '{"lr": 1e999}'),
    "a smaller one": within("optim", '{"lr": -1e999}'),
    "a long name": within("name", '"' + "a" * (MAX_BODY_BYTES - 1000) + '"'),
    "a long method": within("method", '"' + "opd" * 1_000_000 + '"'),
    "a long key": b'{"' + b"k" * (MAX_BODY_BYTES - 100) + b'": 1}',
    "a dotted key": b'{"' + b"a." * (MAX_BODY_BYTES // 2 - 100) + b'": 1}',
    "a long list": within("student", "[" + "0," * 1_000_000 + "0]"),
    "a lone surrogate": within("name", '"\\ud800"'),
    "no text": b'{"name": "\xff\xfe"}',
    "no value": b'{"name":',
    "another kind of value": b'"name"',
}
FULL: dict[str, tuple[str, ...]] = {  # filled when they are sent: that takes a while
    "unknown settings": ("{", '"k{n}":0'),
    "unknown settings of a table": ('{"optim":{', '"k{n}":0', "}}"),
    "one setting again and again": ("{", '"name":"a"'),
    "metadata": ('{"metadata":{', '"k{n}":""', "}}"),
}


def hostile(what: str) -> bytes:
    return filled(*FULL[what]) if what in FULL else BODIES[what]


@pytest.mark.parametrize("what", sorted(BODIES | FULL))
def test_a_body_that_is_meant_to_hurt_is_refused_soon_and_without_memory(target: Target, what: str):
    response = target.post(hostile(what))
    assert response.status_code in {400, 413}, response.text[:500]
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert target.http.get("/livez").is_success


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/v1/keys", ('{"owner":"a","scopes":[', '"runs:read{n}"', "]}")),
        ("/v1/keys", ('{"owner":"a",', '"k{n}":0')),
        ("/v1/fine_tuning/jobs", ('{"method":{"type":"distillation","distillation":{', '"k{n}":0', "}}}")),
        ("/v1/teachers", ('{"name":"a","teacher":{"kind":"openai",', '"k{n}":0', "}}")),
        ("/v1/score", ('{"teacher":"a","items":[', "[{n}]", "]}")),
        ("/v1/runs/nobody/fork", ('{"name":"a","overrides":{', '"a.b.{n}":0', "}}")),
    ],
    ids=["scopes", "key", "job", "teacher", "score", "fork"],
)
def test_every_route_that_reads_a_body_bears_a_full_one(target: Target, path: str, parts: tuple[str, ...]):
    assert target.post(filled(*parts), path).status_code in {400, 404, 413}


def test_a_body_beyond_the_limit_is_a_413_before_it_has_been_sent(target: Target):
    assert target.post(b'{"a": "' + b"x" * MAX_BODY_BYTES + b'"}').status_code == 413
    with socket.create_connection(target.address, timeout=SOON_S) as client:
        key = target.http.headers["authorization"]
        head = (
            f"POST /v1/runs HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
        )
        client.sendall(f"{head}content-length: {1 << 40}\r\n\r\n".encode())
        assert b" 413 " in client.recv(4096).splitlines()[0]


def test_a_body_without_an_announced_end_is_cut_off_at_the_limit(target: Target):
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    sent = 0
    with socket.create_connection(target.address, timeout=SOON_S) as client:
        key = target.http.headers["authorization"]
        head = (
            f"POST /v1/runs HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
        )
        client.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        try:
            while sent < 1024:  # a GiB, if it were let
                client.sendall(chunk)
                sent += 1
        except OSError:  # it has hung up
            pass
    assert sent < 1024
    assert target.http.get("/livez").is_success


def test_a_compressed_body_is_not_unpacked(target: Target):
    bomb = gzip.compress(b" " * (256 << 20), compresslevel=1)
    assert len(bomb) < MAX_BODY_BYTES
    assert target.post(bomb, Content_Encoding="gzip").status_code in {400, 415}
    plain = json.dumps(submitted(name="plain")).encode()
    assert target.post(gzip.compress(plain), Content_Encoding="gzip").status_code in {400, 415}


def test_a_stranger_cannot_have_a_body_read(target: Target):
    for sent in (hostile("unknown settings"), hostile("nesting without end"), b"x" * (2 * MAX_BODY_BYTES)):
        assert target.post(sent, Authorization="Bearer nobody").status_code == 401


def test_none_of_it_took_the_services_memory(target: Target):
    """The same bodies again, all of them, and all at once: what was given back the first time is enough."""
    before = target.peak()
    for _ in range(2):
        for what in BODIES | FULL:
            assert target.post(hostile(what)).status_code in {400, 413}
    assert target.peak() - before < MEMORY


@pytest.mark.parametrize("text", [ESCAPE, FORGED, "\u202edrow\u2066", "a\r\nb", "ps_0123456789ab_" + "k" * 43])
def test_what_a_client_calls_things_is_one_line_of_the_log_and_speaks_to_no_terminal(target: Target, text: str):
    body: dict[str, Any] = submitted(name="logged") | {"notes": text, "metadata": {text: text}}
    target.post(json.dumps(body).encode(), **{"X-Request-Id": "".join(c for c in text if 32 < ord(c) < 127) or "x"})
    target.post(json.dumps(submitted(name=text)).encode())
    target.post(json.dumps({"owner": "a", "label": text}).encode(), "/v1/keys")
    target.post(json.dumps({"reason": text}).encode(), "/v1/runs/logged/cancel")
    target.http.get(f"/v1/runs/{httpx2.QueryParams({'a': text})}")
    target.http.get("/v1/runs", params={"after": text, f"metadata[{text}]": text})
    target.http.get("/v1/files", params={"purpose": text})
    written = target.log.read_bytes().decode()
    for line in written.splitlines():
        assert json.loads(line)["event"] != "forged"
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", written)
    assert "k" * 43 not in written
