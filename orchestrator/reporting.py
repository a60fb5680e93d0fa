"""How a run tells the service what happens to it: the report's shape, the folder it is read from, and the sender.

The run's own events.jsonl and metrics.jsonl are the queue: the sender reads them from the last acknowledged record on,
so that nothing is held in memory while the service is away and nothing is lost that is on disk.
Refuses to block, slow or break the run: every problem of the service stays in the sender's thread.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx2
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from potstill.journal import Status

log = logging.getLogger(__name__)

MAX_RECORDS = 200  # of one stream in one report
MAX_BYTES = 1 << 20  # of one stream in one report, but for its last line
_HOPELESS = frozenset({400, 401, 403, 404, 413, 415, 422})  # the same report would be refused again
GATHER_S = 0.2  # between two reports that say all there is: a service with many runs takes one of ten events as easily
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.2, 5.0

Sequence = Annotated[int, Field(ge=1, lt=2**53)]
Text = Annotated[str, AfterValidator(lambda text: text.replace("\0", "\ufffd"))]  # PostgreSQL keeps no null characters
Seconds = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]


class ReportedEvent(BaseModel):
    """One line of events.jsonl."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seq: Sequence
    time: Seconds
    type: Text
    level: Text
    message: Text
    data: dict[str, JsonValue]


class ReportedMetrics(BaseModel):
    """One line of metrics.jsonl: a step and its numbers."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, float | None]
    seq: Sequence
    time: Seconds
    step: Annotated[int, Field(ge=0, lt=2**53)]

    @property
    def values(self) -> dict[str, float | None]:
        return {"step": self.step, **self.__pydantic_extra__}


class ReportedError(BaseModel):
    """The `error` of a status record."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    type: str
    category: str
    message: str


class ReportedStatus(BaseModel):
    """status.json. It has no number of its own: to hear a status twice changes nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    status: Status
    time: Seconds
    code_version: Annotated[str, Field(max_length=40)] | None = None
    error: ReportedError | None = None


class Report(BaseModel):
    """What one POST carries. Applied as a whole or not at all: events, then metrics, then statuses."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    events: Annotated[list[ReportedEvent], Field(max_length=MAX_RECORDS)] = []
    metrics: Annotated[list[ReportedMetrics], Field(max_length=MAX_RECORDS)] = []
    statuses: Annotated[list[ReportedStatus], Field(max_length=MAX_RECORDS)] = []


class Tail:
    """Reads one of a run's logs from a sequence number on, a piece at a time, while it is still being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0  # of the first line that is not acknowledged, or of one before it
        self._after = 0
        self.drained = False  # whether the last `read` saw the end of the log

    def acknowledge(self, seq: int) -> None:
        """Everything up to `seq` has arrived. A smaller one than before means: read again from there."""
        if seq < self._after:
            self._offset = 0
        self._after = seq

    def read(self) -> list[dict[str, Any]]:
        """The next complete lines, bounded in number and bytes; the same ones until they are acknowledged."""
        records: list[dict[str, Any]] = []
        self.drained = True
        if not self._path.exists():
            return records
        with self._path.open("rb") as file:
            file.seek(self._offset)
            start = self._offset
            while len(records) < MAX_RECORDS and file.tell() - start < MAX_BYTES:
                line = file.readline()
                if not line.endswith(b"\n"):
                    return records
                record = json.loads(line)
                if record["seq"] > self._after:
                    records.append(record)
                else:
                    start = self._offset = file.tell()
        self.drained = False
        return records


def logs_in(folder: Path, held: Mapping[str, int]) -> Iterator[Report]:
    """What a run's logs say beyond the records that are `held` of each, for a process that is gone without sending it.

    Raises ValueError for a line that is no record, OSError when the folder cannot be read.
    """
    tails = {name: Tail(folder / f"{name}.jsonl") for name in ("events", "metrics")}
    for name, tail in tails.items():
        tail.acknowledge(held[name])
    while any((read := {name: tail.read() for name, tail in tails.items()}).values()):
        yield Report.model_validate(read)
        for name, records in read.items():
            if records:
                tails[name].acknowledge(records[-1]["seq"])


def status_in(folder: Path) -> Iterator[Report]:
    """The last status that a run wrote, if any. Raises as logs_in."""
    status = folder / "status.json"
    if status.exists():
        yield Report.model_validate({"statuses": [json.loads(status.read_bytes())]})


class HttpReporter:
    """A journal listener that tells the service. Made in the run's process, fed by the journal, ended by `close`.

    `url` is the service's base URL, `token` the run's own; `folder` is the journal's.
    """

    def __init__(self, url: str, run_id: str, token: str, folder: Path) -> None:
        self._path = f"/v1/runs/{run_id}/events"
        self._client = httpx2.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=10.0, trust_env=False
        )
        self._tails = {"events": Tail(folder / "events.jsonl"), "metrics": Tail(folder / "metrics.jsonl")}
        self._statuses: deque[Mapping[str, Any]] = deque()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._refused = False
        self._deadline: float | None = None  # set by close: time.monotonic() after which the sender gives up
        self._thread = threading.Thread(target=self._send_all, name="potstill-reporter", daemon=True)
        self._thread.start()

    def __call__(self, stream: str, record: Mapping[str, Any]) -> None:
        """Hear one record of the journal. The log itself is the queue; only statuses, which are few, are kept here."""
        if stream == "status":
            self._statuses.append({name: record[name] for name in ("status", "time", "error") if name in record})
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Send what is left, for at most `timeout_s`. False when something did not arrive; it stays on disk."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s + 1.0)
        return not self._thread.is_alive() and self._pending() is None

    def _send_all(self) -> None:
        delay_s = _FIRST_DELAY_S
        while True:
            if (report := self._pending()) is None:
                if self._deadline is not None:
                    return
                self._wake.wait()
                self._wake.clear()
            elif self._send(report):
                delay_s = _FIRST_DELAY_S
                if all(tail.drained for tail in self._tails.values()):
                    self._closing.wait(GATHER_S)
            elif not self._refused and self._wait(delay_s):
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            else:
                return

    def _wait(self, seconds: float) -> bool:
        """Sleep before another try, only shortly while closing; False when there shall be none."""
        start = time.monotonic()
        while True:
            now, deadline = time.monotonic(), self._deadline
            if deadline is not None and now >= deadline:
                return False
            if now - start >= (seconds if deadline is None else _FIRST_DELAY_S):
                return True
            time.sleep(0.05)

    def _pending(self) -> dict[str, list[Any]] | None:
        """The next report, or None when the service knows everything. A status never overtakes an earlier record."""
        statuses = list(self._statuses)[:MAX_RECORDS]  # before the logs: what was logged before a status is then read
        report: dict[str, list[Any]] = {name: tail.read() for name, tail in self._tails.items()}
        if all(tail.drained for tail in self._tails.values()):
            report["statuses"] = statuses
        return report if any(report.values()) else None

    def _send(self, report: Mapping[str, list[Any]]) -> bool:
        """POST one report; whether it was taken. After a gap the next report begins where the service wants it."""
        try:
            response = self._client.post(self._path, json=report)
            body = response.json()
        except (httpx2.TransportError, ValueError) as error:  # ValueError: not the service's JSON, a proxy's page
            log.debug("report not delivered: %s", type(error).__name__)
            return False
        if response.is_success:
            self._acknowledge(body, len(report.get("statuses", [])))
            return True
        if response.status_code == 409 and body["error"]["code"] == "sequence_gap":
            gap = body["error"]["details"][0]
            self._tails[gap["loc"]].acknowledge(gap["wanted"] - 1)
        self._refused = response.status_code in _HOPELESS
        if self._refused:
            log.warning("the service refuses this run's reports: HTTP %d; they stay on disk", response.status_code)
        return False

    def _acknowledge(self, body: Mapping[str, Any], num_statuses: int) -> None:
        for name, tail in self._tails.items():
            tail.acknowledge(body[name])
        for _ in range(num_statuses):
            self._statuses.popleft()
