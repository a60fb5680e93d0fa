"""A run on disk: the folder, its append-only logs, and the state that a stranger finds when the process is gone.

    <runs>/<name>/
      config.json  plan.json  status.json       written atomically
      events.jsonl  metrics.jsonl               append-only, gap-free `seq`
      samples.jsonl                             a few rollouts to look at
      checkpoints/  report.json  report.html

Listeners (a progress display, a reporter over HTTP) see every record after it is on disk. They must not raise.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError, PotstillError


class Status(StrEnum):
    """Where a run stands. The last three are final."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}


Listener = Callable[[str, Mapping[str, Any]], None]  # ("event" | "metrics" | "status", record)


class Journal:
    """Writer of one run's folder. One process writes a folder at a time.

    Raises ConfigError when the folder already holds a run: a run is never overwritten.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / "events.jsonl").exists():
            raise ConfigError(f"{folder} already holds a run: choose another name, or move it away")
        folder.mkdir(parents=True, exist_ok=True)
        self._listeners: list[Listener] = []
        self._sequence = {"event": 0, "metrics": 0}
        self._status = Status.QUEUED
        self._files = {
            "event": (folder / "events.jsonl").open("a", buffering=1),
            "metrics": (folder / "metrics.jsonl").open("a", buffering=1),
        }

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def event(self, type: str, message: str, level: str = "info", **data: Any) -> None:
        """Append one event. `type` is dotted and stable, e.g. "weights.published"; `message` is for people."""
        self._append("event", {"type": type, "level": level, "message": message, "data": data})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one step's numbers. A NaN is written as null: it is missing, not zero."""
        self._append("metrics", {"step": step, **values})

    def status(self, status: Status, *, error: PotstillError | None = None, **detail: Any) -> None:
        """Write status.json. A final status is never left again."""
        if self._status.final:
            raise ValueError(f"{self.folder.name} is already {self._status}")
        self._status = status
        record: dict[str, Any] = {"status": status.value, "time": time.time(), "pid": os.getpid(), **detail}
        if error is not None:
            record["error"] = {"type": type(error).__name__, "category": error.category, "message": str(error)}
        write_json(self.folder / "status.json", record)
        self._tell("status", record)

    def sample(self, record: Mapping[str, Any]) -> None:
        """Append one decoded rollout with its per-token log-probs to samples.jsonl."""
        with (self.folder / "samples.jsonl").open("a") as file:
            file.write(_line(record))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _append(self, stream: str, record: Mapping[str, Any]) -> None:
        self._sequence[stream] += 1
        numbered = {"seq": self._sequence[stream], "time": time.time(), **record}
        self._files[stream].write(_line(numbered))
        self._tell(stream, numbered)

    def _tell(self, stream: str, record: Mapping[str, Any]) -> None:
        for listener in self._listeners:
            listener(stream, record)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints step-N in `folder`, oldest first: by number, for as text step-1000000 precedes step-999999."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete line of a log; a torn last line (a crash while writing) is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def write_json(path: Path, value: Any) -> None:
    """Write so that a reader sees the old file or the new one, never a part; durable when it returns."""
    write_atomically(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite(record), separators=(",", ":")) + "\n"


def finite(value: Any) -> Any:
    """JSON has no NaN: what is missing becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
