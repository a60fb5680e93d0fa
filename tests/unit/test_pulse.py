"""A server's signs of life: one that is asked in time goes on, one that is frozen is ended and lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orchestrator.pulse import server_pulse
from potstill.errors import WorkerLost
from potstill.processes import Child, start

SILENCE_S = 2.0
SERVER = """
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

class Alive(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

server = HTTPServer(("127.0.0.1", 0), Alive)
print(json.dumps({"event": "ready", "url": f"http://127.0.0.1:{server.server_port}"}), flush=True)
server.serve_forever()
"""


@pytest.fixture
async def child(tmp_path: Path) -> AsyncIterator[Child]:
    (tmp_path / "alive.py").write_text(SERVER)
    env = {"PYTHONPATH": str(tmp_path)}
    child = await start("teacher server", "alive", [], log=tmp_path / "log", env=env, timeout_s=30.0)
    yield child
    await child.stop()


async def test_a_server_that_freezes_is_ended_and_lost(child: Child):
    watching = asyncio.create_task(server_pulse(child, SILENCE_S))
    await asyncio.sleep(1.5 * SILENCE_S)
    assert not watching.done()
    child.process.send_signal(signal.SIGSTOP)
    with pytest.raises(WorkerLost, match="the teacher server has given no sign of life for 2 s and was ended"):
        await asyncio.wait_for(watching, 10.0)
    assert child.process.returncode == -signal.SIGKILL
