"""The service under load: how long answers take, whether a reader misses an event, whether its memory grows.

    python -m bench.api [--postgres] [--seconds 60] [--readers 200] [--runs 1000] [--events 1000000]

The service is a process of its own over a database that holds RUNS runs and EVENTS events, SQLite or a PostgreSQL that
the bench starts. This process is its load: ten runs report 100 events a second each, as orchestrator/reporting.py
does; READERS follow them over server-sent events; beside that clients create, read and list on a clock. Times are from
when a request was due until its answer is read; `load_lag_p99_s` is by how much this process was late itself. A reader
that misses an event, gets one twice or out of order, and an event that was acknowledged and is not stored, end the
bench with an error. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.api import rows, traffic
from bench.api.server import SECRET
from bench.api.traffic import Reader, Seen, request
from bench.overload import Caller
from orchestrator.service.keys import Signer
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from potstill.config_file import parse
from tests.ports import free_port
from tests.postgres import postgres
from tests.service_configs import small_files, submitted

AT_WORK = 10
EVENTS_PER_S = 100.0  # of each run that is at work
RATES = {"create": 5.0, "get": 40.0, "list": 20.0, "events": 20.0}  # requests per second
WARM_S = 5.0
DRAIN_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--events", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, _database(Path(place), options.postgres) as url:
        print(json.dumps(measure(Path(place), url, options), indent=2))


@contextmanager
def _database(place: Path, on_postgres: bool) -> Iterator[str]:
    if not on_postgres:
        yield f"sqlite:///{place / 'potstill.db'}"
        return
    with postgres() as server:
        yield server.database("bench")


def measure(place: Path, database: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fill the database, serve it, load it, and say what happened."""
    small_files(place)
    config = parse(submitted()).model_dump(mode="json")
    store = Store(Database(database))
    try:
        key = rows.fill(store, config, runs=options.runs, at_work=AT_WORK, events=options.events)
        with _server(place, database) as (port, pid):
            seen, found = asyncio.run(_load(port, pid, key, options))
        lost = [run for run, number in seen.reported.items() if store.events.reported(run)["events"] < number]
    finally:
        store.close()
    assert not lost, f"events that were acknowledged are not stored: {lost}"
    return {"database": database.partition(":")[0], "runs": options.runs, "events": options.events, **found}


@contextmanager
def _server(place: Path, database: str) -> Iterator[tuple[int, int]]:
    port = free_port()
    command = [sys.executable, "-m", "bench.api.server", str(place), str(port), database]
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + 60.0
            while not _listens(port):
                assert time.monotonic() < deadline, "the service did not come up"
                assert process.poll() is None, "the service ended"
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


async def _load(port: int, pid: int, key: str, options: argparse.Namespace) -> tuple[Seen, dict[str, Any]]:
    begun = options.events // options.runs  # events that each run has already
    made_at = {rows.busy(number): [0.0] * (begun + 1) for number in range(AT_WORK)}
    warm, seen = Seen(), Seen()
    readers = [
        await _reader(port, key, list(made_at)[n % AT_WORK], begun, made_at, seen) for n in range(options.readers)
    ]
    url, signer = f"http://127.0.0.1:{port}", Signer(SECRET)
    reporting = [
        asyncio.create_task(
            traffic.report(Caller(url), run, signer.token(rows.submission_id(run)), times, EVENTS_PER_S, seen)
        )
        for run, times in made_at.items()
    ]
    async with _asking(Caller(url), key, warm):
        await asyncio.sleep(WARM_S)
    for times in (seen.delivered_s, seen.records):
        times.clear()
    memory: list[tuple[float, int]] = []
    server = psutil.Process(pid)
    server_cores, load_cores = _cores(server), _cores(psutil.Process())
    async with _asking(Caller(url), key, seen):
        watching = asyncio.create_task(
            traffic.every(1.0, lambda: memory.append((time.monotonic(), server.memory_info().rss)))
        )
        await asyncio.sleep(options.seconds)
        watching.cancel()
    used = {"server_cores": server_cores(), "load_cores": load_cores()}
    for task in reporting:
        if task.done():
            task.result()
        task.cancel()
    await _drain(readers, seen)
    return seen, _figures(seen, readers, memory) | used


async def _reader(
    port: int, key: str, run: str, after: int, made_at: dict[str, list[float]], seen: Seen
) -> tuple[str, Reader]:
    message = request("GET", f"/v1/runs/{run}/events", key, accept="text/event-stream", last_event_id=str(after))
    loop = asyncio.get_running_loop()
    _, reader = await loop.create_connection(lambda: Reader(message, after, made_at[run], seen), "127.0.0.1", port)
    return run, reader


@contextlib.asynccontextmanager
async def _asking(caller: Caller, key: str, seen: Seen) -> AsyncIterator[None]:
    """Clients, for as long as the block."""
    marks = itertools.count(time.time_ns())
    kinds = {
        "create": (
            request("POST", "/v1/runs", key, json.dumps(submitted(name=f"new-{mark}")).encode()) for mark in marks
        ),
        "get": itertools.cycle(request("GET", f"/v1/runs/done-{number}", key) for number in range(100)),
        "list": itertools.repeat(request("GET", "/v1/runs?limit=20", key)),
        "events": itertools.cycle(
            request("GET", f"/v1/runs/done-{number}/events?after={number * 5}&limit=100", key) for number in range(100)
        ),
    }
    tasks = [asyncio.create_task(traffic.ask(caller, kind, kinds[kind], rate, seen)) for kind, rate in RATES.items()]
    tasks.append(asyncio.create_task(traffic.watch_lag(seen)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        caller.close()
    for task in tasks:  # one that ended by itself asked nothing from then on
        assert task.cancelled(), f"a client broke off: {task.exception()!r}"


async def _drain(readers: list[tuple[str, Reader]], seen: Seen) -> None:
    """Wait until every reader has what was acknowledged."""
    deadline = time.monotonic() + DRAIN_S
    while any(reader.own < seen.reported[run] and not reader.wrong for run, reader in readers):
        assert time.monotonic() < deadline, "readers do not get what the service has acknowledged"
        await asyncio.sleep(0.1)


def _figures(seen: Seen, readers: list[tuple[str, Reader]], memory: list[tuple[float, int]]) -> dict[str, Any]:
    wrong = [f"{run}: {reader.wrong}" for run, reader in readers if reader.wrong]
    assert not wrong, f"{len(wrong)} readers saw something else than each event once and in order: {wrong[0]}"
    return {
        "answers": {
            kind: {"count": len(times), "p50_s": _quantile(times, 0.5), "p99_s": _quantile(times, 0.99)}
            for kind, times in seen.answered_s.items()
        },
        "refused": seen.refused,
        "readers": len(readers),
        "delivered_p50_s": _quantile(seen.delivered_s, 0.5),
        "delivered_p99_s": _quantile(seen.delivered_s, 0.99),
        "reports": len(seen.records),
        "events_per_report": float(np.mean(seen.records)),
        "events_reported": sum(seen.records),
        "server_rss_bytes": memory[-1][1],
        "server_rss_bytes_per_minute": _slope(memory) * 60,
        "load_lag_p99_s": _quantile(seen.lag_s, 0.99),
    }


def _cores(process: psutil.Process) -> Callable[[], float]:
    """Asked later: how many cores the process used in between."""
    then, began = process.cpu_times(), time.monotonic()

    def used() -> float:
        now = process.cpu_times()
        return float(now.user + now.system - then.user - then.system) / (time.monotonic() - began)

    return used


def _slope(memory: list[tuple[float, int]]) -> float:
    """Bytes per second, over the last two thirds: caches fill at first."""
    late = np.array(memory[len(memory) // 3 :], dtype=float)
    return float(np.polyfit(late[:, 0], late[:, 1], 1)[0])


def _quantile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
