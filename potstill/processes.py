"""A child process that says when it is ready, and does not outlive its parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError, PotstillError, WorkerLost

GRACE_S = 10.0
_PARENT_POLL_S = 0.5


@dataclass(slots=True, kw_only=True)
class Child:
    """A started module that has printed its one JSON line."""

    name: str
    process: asyncio.subprocess.Process
    ready: Mapping[str, Any]
    log: Path
    stopping: bool = field(default=False)

    async def died(self) -> None:
        """Wait for the end of the process; raises WorkerLost unless `stop` asked for it."""
        code = await self.process.wait()
        if not self.stopping:
            raise WorkerLost(f"the {self.name} ended with exit code {code}; its log is {self.log.name}")

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """SIGTERM, then SIGKILL after the grace period. Returns when the process is gone."""
        self.stopping = True
        if self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """At once, also when it is frozen. Returns when the process is gone."""
        self.stopping = True
        self.process.kill()
        await self.process.wait()


async def start(
    name: str, module: str, arguments: Sequence[str], *, log: Path, env: Mapping[str, str], timeout_s: float
) -> Child:
    """Run `python -m module arguments…` in a session of its own until it prints a JSON line with `event: ready`.

    Raises the ConfigError that the child's exit code 2 means, WorkerLost when it ends or is silent for timeout_s.
    """
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            env={**os.environ, **env},
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        )
    child = Child(name=name, process=process, ready={}, log=log)
    try:
        async with asyncio.timeout(timeout_s):
            child.ready = await _ready_line(process)
    except TimeoutError:
        await child.stop()
        raise WorkerLost(f"the {name} was not ready after {timeout_s:.0f} s; its log is {log}") from None
    except EOFError:
        raise await _failure(child) from None
    except asyncio.CancelledError:
        await child.stop()
        raise
    return child


def end_with_parent(parent: int) -> None:
    """Send ourselves SIGTERM once `parent` is gone.

    Asking for our parent's id needs no privileges and works everywhere. Linux's PR_SET_PDEATHSIG does not fit: it
    fires when the *thread* that started us ends, which may be long before its process does.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


async def _ready_line(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        if line.startswith(b'{"event": "ready"'):
            found: dict[str, Any] = json.loads(line)
            return found
    raise EOFError


async def _failure(child: Child) -> PotstillError:
    code = await child.process.wait()
    said = child.log.read_text(errors="replace").strip().splitlines()
    last = said[-1] if said else "it said nothing"
    kind = ConfigError if code == ConfigError.exit_code else WorkerLost
    return kind(f"the {child.name} did not start: {last}")
