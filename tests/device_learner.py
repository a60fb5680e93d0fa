"""A learner's process that publishes folders from its device, on command: real weights, a real outbox, its own death.

As a program it reads one JSON object a line and answers each with one line: {"folder", "version"} publishes, and is
answered with the version, pickled; {"damage": name} flips a bit of a tensor in the outbox's room.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from potstill.types import WeightsVersion


class DeviceLearner:
    """The process, as a test sees it. Its outbox sends every tensor as a piece of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.device_learner"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def publish(self, folder: Path, version: int, *, wire: str = "exact") -> WeightsVersion:
        answer = self._ask(folder=str(folder), version=version, wire=wire)
        published: WeightsVersion = pickle.loads(bytes.fromhex(answer))  # noqa: S301
        return published

    def damage(self, name: str) -> None:
        self._ask(damage=name)

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.communicate("")

    def _ask(self, **words: Any) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()


def main() -> None:
    import torch

    from learner.model import load_student
    from learner.outbox import Outbox
    from learner.publish import DevicePublisher
    from potstill.config import StudentConfig
    from potstill.transports import rows
    from potstill.transports.route import Route

    outbox = Outbox("127.0.0.1", piece_bytes=1)
    published: WeightsVersion | None = None
    for line in sys.stdin:
        words = json.loads(line)
        if "damage" in words:
            assert published is not None
            entry = next(entry for entry in published.tensors if entry.name == words["damage"])
            row = rows.row(outbox._room, entry)
            row[entry.nbytes // 2] ^= 1
            print("damaged", flush=True)
            continue
        student = load_student(StudentConfig(model=words["folder"]), seed=0, device=torch.device("cpu"))
        route = Route(transport="device", wire=words["wire"], adapter_only=False, reason="")
        published = DevicePublisher(route, outbox).publish(student, version=words["version"])
        print(pickle.dumps(published).hex(), flush=True)
    outbox.close()


if __name__ == "__main__":
    main()
