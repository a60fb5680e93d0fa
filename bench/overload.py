"""A teacher server under many times the load it can carry: what is accepted, how long it takes, what is refused.

    python -m bench.overload [MODEL_FOLDER] [--seconds 10] [--times 100]

Without a folder it is the teacher of bench.teacher, 23.6M parameters. First one request after another, which gives the
server's capacity; then requests on a clock, `times` as many per second, sent whatever comes back. Beside them /livez is
asked every 50 ms. Prints JSON. Requests that found no free connection of CONNECTIONS are counted as not sent, so that
the load really offered is known. It comes from this process, which shares the machine with the server: its figures
of /livez include its own delays.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.teacher import save_teacher
from potstill.codec import SAFETENSORS, encode_request
from potstill.wire import Ask, ScoreItem, ScoreRequest

KEY = "bench"
CONNECTIONS = 512
KEPT_S = 4.0  # that a connection lies unused before it is left: the servers close theirs after 5
PROMPT_TOKENS, COMPLETION_TOKENS = 100, 400
QUEUE_TOKENS = 4000  # 8 requests
LIVEZ_EVERY_S = 0.05
CAPACITY_REQUESTS = 8


@dataclass
class Seen:
    """What came back during the overload. Times in seconds."""

    accepted_s: list[float] = field(default_factory=list)
    livez_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    without_retry_after: int = 0
    not_sent: int = 0
    broken: int = 0  # connections that ended without an answer
    peak_rss: int = 0


class Caller:
    """Raw HTTP/1.1 over kept connections: a client that costs far less than the server it loads."""

    def __init__(self, url: str) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []  # since when
        self._open = 0

    async def call(self, message: bytes) -> tuple[int, bytes] | None:
        """Status and headers of the answer, its body read; None when no connection is free. Raises OSError."""
        if not self._idle and self._open >= CONNECTIONS:
            return None
        self._open += 1
        try:
            reader, writer = self._kept() or await asyncio.open_connection(self._host, self._port)
            writer.write(message)
            await writer.drain()
            headers = await reader.readuntil(b"\r\n\r\n")
            (length,) = (line for line in headers.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            if b"connection: close" in headers.lower():
                writer.close()
            else:
                self._idle.append((time.monotonic(), reader, writer))
        finally:
            self._open -= 1
        return int(headers[9:12]), headers

    def close(self) -> None:
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()

    def _kept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The connection that was used last, unless its server may have closed it since."""
        if self._idle and time.monotonic() - self._idle[-1][0] > KEPT_S:
            self.close()
        return self._idle.pop()[1:] if self._idle else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="default: bench.teacher's")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--times", type=float, default=100.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.model is None:
            save_teacher(Path(place) / "teacher")
        model = options.model or Path(place) / "teacher"
        print(json.dumps(measure(model, seconds=options.seconds, times=options.times), indent=2))


def measure(model: Path, *, seconds: float, times: float) -> dict[str, Any]:
    """Overload a server of its own with `times` its capacity for `seconds`, and say what happened."""
    with server(model) as (url, pid):
        return asyncio.run(_measure(url, pid, model.resolve().name, seconds, times))


@contextlib.contextmanager
def server(model: Path) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "teacher_server", str(model), "--key-env", "BENCH_KEY", "--exit-with-parent"]
    limits = ["--queue-tokens", str(QUEUE_TOKENS), "--max-tokens", str(QUEUE_TOKENS), "--batch-tokens", "1000"]
    environment = {**os.environ, "BENCH_KEY": KEY, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"], process.pid
        finally:
            process.terminate()


async def _measure(url: str, pid: int, name: str, seconds: float, times: float) -> dict[str, Any]:
    message, seen = _message(name), Seen()
    caller, watcher = Caller(url), Caller(url)
    started = time.monotonic()
    for _ in range(CAPACITY_REQUESTS):
        await caller.call(message)
    capacity = CAPACITY_REQUESTS / (time.monotonic() - started)
    rss_before = _rss(pid)
    async with _watching(watcher, pid, seen):
        await _offer(caller, message, seen, rate=times * capacity, seconds=seconds)
    caller.close()
    watcher.close()
    sent = seen.statuses.total() + seen.broken
    return {
        "capacity_requests_per_s": capacity,
        "offered_times_capacity": (sent + seen.not_sent) / seconds / capacity,
        "sent_times_capacity": sent / seconds / capacity,
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "refused_without_retry_after": seen.without_retry_after,
        "broken_connections": seen.broken,
        "accepted_p50_s": _quantile(seen.accepted_s, 0.5),
        "accepted_p99_s": _quantile(seen.accepted_s, 0.99),
        "full_queue_s": QUEUE_TOKENS / (PROMPT_TOKENS + COMPLETION_TOKENS) / capacity,
        "livez_p50_s": _quantile(seen.livez_s, 0.5),
        "livez_p99_s": _quantile(seen.livez_s, 0.99),
        "livez_max_s": max(seen.livez_s),
        "rss_before_bytes": rss_before,
        "rss_peak_bytes": seen.peak_rss,
    }


async def _offer(caller: Caller, message: bytes, seen: Seen, *, rate: float, seconds: float) -> None:
    """Send on the clock, a burst each 10 ms, and wait for what was sent."""
    started, due = time.monotonic(), 0
    async with asyncio.TaskGroup() as calls:
        while (elapsed := time.monotonic() - started) < seconds:
            for _ in range(int(rate * elapsed) - due):
                due += 1
                calls.create_task(_one(caller, message, seen))
            await asyncio.sleep(0.01)


async def _one(caller: Caller, message: bytes, seen: Seen) -> None:
    started = time.monotonic()
    try:
        answer = await caller.call(message)
    except (OSError, asyncio.IncompleteReadError):
        seen.broken += 1
        return
    if answer is None:
        seen.not_sent += 1
        return
    status, headers = answer
    seen.statuses[status] += 1
    if status == 200:
        seen.accepted_s.append(time.monotonic() - started)
    elif b"retry-after" not in headers.lower():
        seen.without_retry_after += 1


@contextlib.asynccontextmanager
async def _watching(watcher: Caller, pid: int, seen: Seen) -> AsyncIterator[None]:
    async def watch() -> None:
        while True:
            started = time.monotonic()
            await watcher.call(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            seen.livez_s.append(time.monotonic() - started)
            seen.peak_rss = max(seen.peak_rss, _rss(pid))
            await asyncio.sleep(LIVEZ_EVERY_S)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


def _message(name: str) -> bytes:
    ids = np.arange(COMPLETION_TOKENS, dtype=np.int32) % 200
    item = ScoreItem(id="a", context_ids=ids[:PROMPT_TOKENS], completion_ids=ids)
    body = encode_request(ScoreRequest(model=name, items=(item,), ask=Ask(top_k=8)), SAFETENSORS)
    head = (
        f"POST /v1/score HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: {SAFETENSORS}\r\naccept: {SAFETENSORS}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")


if __name__ == "__main__":
    main()
