"""Who may write into a run's folder: one driver at a time, and only what the newest attempt makes.

    <run>/lock      held by the process that drives the run, for as long as it lives; names it
    <run>/attempt   the newest attempt's number: a fencing token, which only grows

A lock stops a second driver. It does not stop a worker or a learner of an earlier attempt that was frozen and wakes:
the fence does, which whoever renames a file into place asks just before.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from potstill.errors import ConfigError, Fenced, RunError
from potstill.journal import write_atomically


@dataclass(frozen=True, slots=True)
class Fence:
    """Stands between attempt `attempt` of the run in `folder` and its files. Travels between processes."""

    folder: Path
    attempt: int

    def check(self) -> None:
        """Raise Fenced when a newer attempt has begun."""
        newest = newest_attempt(self.folder)
        if newest > self.attempt:
            raise Fenced(f"{self.folder}: attempt {newest} has begun; this process belongs to {self.attempt} and ends")


def newest_attempt(folder: Path) -> int:
    """0 before the first. Raises RunError when the file holds no number."""
    path = folder / "attempt"
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
    except ValueError:
        raise RunError(f"{path} holds no number: write one above every attempt so far, and resume") from None


def next_attempt(folder: Path) -> int:
    """Begin another attempt: from now on every earlier one is fenced off. No two callers get the same number."""
    with (folder / ".attempt.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
        number = newest_attempt(folder) + 1
        write_atomically(folder / "attempt", f"{number}\n".encode())
    return number


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the one process that drives the run in `folder`. The system lets go of it when the process dies, however.

    Raises ConfigError naming who holds it. The file stays: to remove it would let two hold two files of one name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(_held(folder, file.read())) from None
        _name(file.fileno(), f"{os.getpid()} {socket.gethostname()}\n")
        try:
            yield
        finally:
            _name(file.fileno(), "")


def _held(folder: Path, owner: str) -> str:
    pid, _, host = owner.strip().partition(" ")
    who = f"process {pid} on {host}" if pid else "another process"
    way_out = f"or end it there: kill {pid}" if pid else "or end it"
    return f"{folder}: {who} is at work on this run; wait until it is done, {way_out}"


def _name(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
