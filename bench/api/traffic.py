"""What a busy service hears: runs that report, readers that follow them, clients that ask. Raw asyncio streams.

Everything is sent on a clock, whatever comes back, and a time is measured from when a request was due. Each reader
checks that it sees every event of its run once and in order, by the service's numbers and by the run's own.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bench.overload import Caller
from orchestrator.reporting import GATHER_S, MAX_RECORDS

TICK_S = 0.01
_SEEN = re.compile(rb'"message": ?"made (\d+)".*\nid: (\d+)\n')


@dataclass
class Seen:
    """Times in seconds."""

    answered_s: dict[str, list[float]] = field(default_factory=dict)  # by kind of request
    refused: Counter[str] = field(default_factory=Counter)  # by kind and status
    delivered_s: list[float] = field(default_factory=list)  # from an event to one of its readers
    reported: dict[str, int] = field(default_factory=dict)  # events that the service acknowledged, by run
    records: list[int] = field(default_factory=list)  # in each report
    lag_s: list[float] = field(default_factory=list)  # by which this process itself was late


def request(method: str, path: str, key: str, body: bytes | None = None, **headers: str) -> bytes:
    """An HTTP/1.1 message."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"authorization: Bearer {key}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Reader(asyncio.Protocol):
    """Follows one run. Its numbers go on from `after`; `made_at` tells when the run made each event."""

    def __init__(self, message: bytes, after: int, made_at: list[float], seen: Seen) -> None:
        self._message = message
        self.number = self.own = after
        self._made_at = made_at
        self._seen = seen
        self._rest = b""
        self.wrong: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._message)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        text = self._rest + data
        end = first = 0
        for found in _SEEN.finditer(text):
            end, first = found.end(), first or int(found[1])
            if (int(found[1]), int(found[2])) != (self.own + 1, self.number + 1):
                self.wrong = self.wrong or f"after {self.own}/{self.number} came {found[1]!r}/{found[2]!r}"
            self.own, self.number = int(found[1]), int(found[2])
        self._rest = text[end:]
        if first:
            self._seen.delivered_s.append(time.monotonic() - self._made_at[first])

    def connection_lost(self, _error: Exception | None) -> None:
        self.wrong = self.wrong or "its stream ended"


async def report(caller: Caller, run_id: str, token: str, made_at: list[float], rate: float, seen: Seen) -> None:
    """A run that makes events at `rate`, and sends what it has whenever the report before was taken. Cancel it."""
    started, sent = time.monotonic(), len(made_at) - 1
    first = sent
    while True:
        due = first + int((time.monotonic() - started) * rate)
        made_at.extend([time.monotonic()] * (due + 1 - len(made_at)))
        numbers = range(sent + 1, min(due, sent + MAX_RECORDS) + 1)
        if not numbers:
            await asyncio.sleep(TICK_S)
            continue
        body = json.dumps({"events": [_event(number) for number in numbers], "metrics": []}).encode()
        answer = await caller.call(request("POST", f"/v1/runs/{run_id}/events", token, body))
        assert answer is not None, "a reporter has a connection of its own"
        assert answer[0] == 200, f"a report was refused: {answer[0]}"
        sent = numbers[-1]
        if len(numbers) < MAX_RECORDS:
            await asyncio.sleep(GATHER_S)
        seen.reported[run_id] = sent
        seen.records.append(len(numbers))


async def ask(caller: Caller, kind: str, messages: Iterator[bytes], rate: float, seen: Seen) -> None:
    """Requests of one kind at `rate`. Cancel it."""
    started, count = time.monotonic(), 0
    async with asyncio.TaskGroup() as calls:
        while True:
            due = started + count / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            count += 1
            calls.create_task(_one(caller, kind, next(messages), due, seen))


async def watch_lag(seen: Seen) -> None:
    """How late this process's own loop is: what the other times contain of it. Cancel it."""
    while True:
        due = time.monotonic() + TICK_S
        await asyncio.sleep(TICK_S)
        seen.lag_s.append(time.monotonic() - due)


async def every(seconds: float, look: Callable[[], None]) -> None:
    """Cancel it."""
    while True:
        look()
        await asyncio.sleep(seconds)


async def _one(caller: Caller, kind: str, message: bytes, due: float, seen: Seen) -> None:
    answer = await caller.call(message)
    status = 0 if answer is None else answer[0]  # 0: more requests are under way than there are connections
    if not 200 <= status < 300:
        seen.refused[f"{kind} {status}"] += 1
    else:
        seen.answered_s.setdefault(kind, []).append(time.monotonic() - due)


def _event(number: int) -> dict[str, object]:
    data = {"step": number, "loss": 0.5, "seconds": 1.0}
    return {
        "seq": number,
        "time": 1.0,
        "type": "step.finished",
        "level": "info",
        "message": f"made {number}",
        "data": data,
    }
