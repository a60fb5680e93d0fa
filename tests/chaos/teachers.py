"""Teachers outside a run: a real server on a port that stays the same, and one whose answers are spoilt on the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

KEY = "chaos"
Fault = Literal["pass", "busy", "slow down", "hang", "half", "reset"]
HANG_S = 20.0


@dataclass(slots=True)
class Server:
    """`python -m teacher_server`, in a process of its own that can be killed and started again."""

    place: Path
    port: int
    host: str = "127.0.0.1"
    inside: Sequence[str] = ()  # what the command is run by, e.g. in a network namespace
    process: subprocess.Popen[str] | None = field(default=None)

    @property
    def changes(self) -> tuple[str, ...]:
        """Of a run's config, for this teacher in place of its own."""
        url = f"http://{self.host}:{self.port}"
        return (f"teacher={{kind: server, url: '{url}', secret_ref: 'env:TEACHER_KEY', deadline_s: 3}}",)

    def start(self) -> None:
        command = [*self.inside, sys.executable, "-m", "teacher_server", "teacher", "--host", self.host]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--key-env", "TEACHER_KEY"],
            cwd=self.place,
            env={**os.environ, "TEACHER_KEY": KEY, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline())["event"] == "ready"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@dataclass(slots=True)
class Proxy:
    """`met`: the server as it is met through the proxy; `done`: what was done to requests since it `spoils`."""

    met: Server
    spoils: bool = False
    done: list[Fault] = field(default_factory=list)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def external(place: Path, **changes: Any) -> Iterator[Server]:
    server = Server(place, free_port(), **changes)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def spoiling(server: Server, script: Sequence[Fault]) -> Iterator[Proxy]:
    """A proxy before the server; once it spoils, every request for scores takes the next fault of the script, which
    repeats."""
    proxy = Proxy(server)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            fault: Fault = "pass"
            if proxy.spoils and self.path == "/v1/score":
                fault = script[len(proxy.done) % len(script)]
                proxy.done.append(fault)
            status, headers, content = forwarded(server, self.command, self.path, dict(self.headers), body)
            self.close_connection = fault != "pass"
            if fault in {"busy", "slow down"}:
                status, content = (503, b"{}") if fault == "busy" else (429, b"{}")
                headers = {"content-type": "application/json", "retry-after": "1"} if fault == "slow down" else {}
            elif fault == "hang":
                time.sleep(HANG_S)
                return
            elif fault == "reset":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "half" else content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        proxy.met = Server(server.place, http.server_address[1])
        yield proxy
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def forwarded(
    server: Server, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, dict[str, str], bytes]:
    kept = {name: headers[name] for name in headers if name.lower() in {"authorization", "content-type", "accept"}}
    url = f"http://{server.host}:{server.port}{path}"
    request = urllib.request.Request(url, data=body or None, headers=kept, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, {"content-type": answer.headers["content-type"]}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {"content-type": error.headers["content-type"]}, error.read()
