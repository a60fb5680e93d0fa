"""A command whose stdout and stderr are a terminal, and what it painted there."""

from __future__ import annotations

import os
import pty
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_a_terminal(
    command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> tuple[int, str]:
    """The command's exit code, and everything that it sent to the terminal, of 120 columns."""
    ours, theirs = pty.openpty()
    painted = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(ours, 1 << 16):
                painted.extend(chunk)
        except OSError:  # Linux says so when the other end is closed
            return

    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", **(env or {})}
    reader = threading.Thread(target=read)
    try:
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT)
        reader.start()
        code = process.wait(timeout_s)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return code, painted.decode()
