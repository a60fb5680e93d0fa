"""A run on disk: the folder, its append-only logs, and the state that a stranger finds when the process is gone.

    <runs>/<name>/
      config.json  plan.json  status.json       written atomically
      events.jsonl  metrics.jsonl               append-only, gap-free `seq`
      ledger.jsonl                              which prompts each step trained
      samples.jsonl                             a few rollouts to look at
      checkpoints/  report.json  report.html

Listeners (a progress display, a reporter over HTTP) see every record after it is on disk. They must not raise.
A disk that refuses is a RunError that names the folder.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from io import FileIO
from pathlib import Path
from typing import Any

from potstill import __version__
from potstill.errors import ConfigError, PotstillError
from potstill.refusals import refusals


class Status(StrEnum):
    """Where a run stands. The last three are final: only a run that is resumed leaves one of them again."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    WAITING_TEACHER = "waiting_teacher"
    RECOVERING = "recovering"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}


STOP_AT_ONCE = ".stop-at-once"
"""Beside the logs: whoever asks the run to stop does not want to wait for a checkpoint."""

KEPT = ".kept"
"""In a checkpoint: a run begins with it, mostly another one, so that its own no longer removes it by itself."""

Listener = Callable[[str, Mapping[str, Any]], None]  # ("event" | "metrics" | "status", record)


def has_begun(folder: Path) -> bool:
    """Whether a run's folder holds something to go on from."""
    return (folder / "events.jsonl").exists()


class Journal:
    """Writer of one run's folder. One process writes a folder at a time.

    Raises ConfigError when the folder already holds a run: a run is never overwritten; and, where one is resumed, when
    there is none. What a killed process left half-written at the end of a log is cut off.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self.folder = folder
        exists = has_begun(folder)
        if exists and not resume:
            raise ConfigError(f"{folder} already holds a run: choose another name, move it away, or --resume it")
        if resume and not exists:
            raise ConfigError(f"{folder} holds no run to resume: start it without --resume")
        folder.mkdir(parents=True, exist_ok=True)
        self._listeners: list[Listener] = []
        self._status = Status.QUEUED
        self._paths = {"event": folder / "events.jsonl", "metrics": folder / "metrics.jsonl"}
        self._sequence = {stream: _whole_lines(path) for stream, path in self._paths.items()}
        self._files = {stream: path.open("ab", buffering=0) for stream, path in self._paths.items()}
        for name in ("ledger.jsonl", "samples.jsonl"):
            _whole_lines(folder / name)

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
        now: dict[str, Any] = {"status": status.value, "time": time.time()}
        record = now | {"pid": os.getpid(), "code_version": __version__} | detail
        if error is not None:
            record["error"] = {"type": type(error).__name__, "category": error.category, "message": str(error)}
        write_json(self.folder / "status.json", record)
        self._tell("status", record)

    def trained(self, step: int, prompts: Sequence[str]) -> None:
        """Append to ledger.jsonl which prompts a step was made of; read it by `steps_in`, as the metrics."""
        self._add("ledger.jsonl", {"step": step, "prompts": list(prompts)})

    def sample(self, record: Mapping[str, Any]) -> None:
        """Append one decoded rollout with its per-token log-probs to samples.jsonl."""
        self._add("samples.jsonl", record)

    @property
    def num_steps(self) -> int:
        """Lines of metrics so far, also of steps that were done again."""
        return self._sequence["metrics"]

    def sync(self) -> None:
        """Make what is logged survive a power cut, as the checkpoint does that refers to it."""
        for stream, file in self._files.items():
            with refusals(self._paths[stream]):
                os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _append(self, stream: str, record: Mapping[str, Any]) -> None:
        numbered = {"seq": self._sequence[stream] + 1, "time": time.time(), **record}
        with refusals(self._paths[stream]):
            _write_whole(self._files[stream], numbered)
        self._sequence[stream] += 1
        self._tell(stream, numbered)

    def _add(self, log: str, record: Mapping[str, Any]) -> None:
        with refusals(self.folder / log), (self.folder / log).open("ab", buffering=0) as file:
            _write_whole(file, record)

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


def steps_in(folder: Path, log: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The records of each step that counts, in order. A run that went back to a checkpoint undid what came after it."""
    steps: list[dict[str, Any]] = []
    for record in read_jsonl(folder / log):
        while steps and steps[-1]["step"] >= record["step"]:
            steps.pop()
        steps.append(record)
    return steps


def write_json(path: Path, value: Any) -> None:
    """Write so that a reader sees the old file or the new one, never a part; durable when it returns."""
    write_atomically(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with refusals(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole_lines(path: Path) -> int:
    """How many a log has; what comes after the last of them is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole.count(b"\n")


def _write_whole(file: FileIO, record: Mapping[str, Any]) -> None:
    """A line, or nothing of it: what is torn would spoil the line after it. Raises OSError."""
    line = (json.dumps(finite(record), separators=(",", ":")) + "\n").encode()
    size = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def finite(value: Any) -> Any:
    """JSON has no NaN: what is missing becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
