"""A sink whose client lives in a process of its own, `python -m potstill.sinks KIND`.

    {"do": "step", "with": {…}} ──► stdin     stdout ──► {"error": null}      one answer a record
                                    stderr ──► <run>/sinks/KIND.log

Clients of others install exit hooks, signal handlers and threads, capture output, read keys from the environment, and
may hang where no exception reaches. In a process they can be ended, and they find nothing but what they are given: no
variable of ours, and a home folder without a key. A client resolves names by itself; they are judged just before.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2

from potstill.calling.guard import Guard
from potstill.errors import SinkError, TargetRefused
from potstill.sinks.sink import Ending, Facts, Note, Rewind, SinkLost, Step

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
FOLDER = "sinks"  # below the run's


class ProcessSink:
    """Drives the client `kind`. `settings` is its table, `secret` the value of its secret_ref.

    `url`: where the client will call, judged by `guard` whenever it is opened. `command` starts the process.
    """

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, Any],
        *,
        secret: str | None = None,
        url: str | None = None,
        guard: Guard | None = None,
        command: Sequence[str] = (sys.executable, "-P", "-m", "potstill.sinks"),
    ) -> None:
        self._kind = kind
        self._settings = settings
        self._secret = secret
        self._url = url
        self._guard = guard
        self._command = (*command, kind)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._log = Path(os.devnull)

    def open(self, facts: Facts) -> None:
        if self._url is not None and self._guard is not None:
            judge(self._url, self._guard)
        folder = facts.folder / FOLDER
        self._log = folder / f"{self._kind}.log"
        self._end()
        try:
            folder.mkdir(exist_ok=True)
            with self._log.open("ab") as log, self._lock:
                if self._killed:
                    raise SinkLost("it is not opened any more")
                self._process = self._start(folder, log.fileno())
        except OSError as error:
            raise SinkError(f"its process cannot be started: {error.strerror}") from None
        given = {**asdict(facts), "folder": str(facts.folder)}
        try:
            self._ask("open", {"settings": self._settings, "secret": self._secret, "facts": given})
        except SinkError:
            self._end()
            raise

    def step(self, step: Step) -> None:
        self._ask("step", asdict(step))

    def note(self, note: Note) -> None:
        self._ask("note", asdict(note))

    def rewind(self, rewind: Rewind) -> None:
        self._ask("rewind", asdict(rewind))

    def finish(self, ending: Ending) -> None:
        """Returns when the process is gone: what clients do at their exit belongs to the end."""
        self._ask("finish", asdict(ending))
        assert self._process is not None, "it was asked"
        code = self._process.wait()
        self._end()
        if code != 0:
            raise SinkLost(self._hidden(f"its process ended with exit code {code}; {self._last_words()}"))

    def kill(self) -> None:
        """End the process and start none again. From any thread, without waiting; whoever waits for an answer gets
        SinkLost."""
        with self._lock:
            self._killed = True
            process = self._process
        if process is not None:
            _kill(process)

    def _start(self, folder: Path, log: int) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        return subprocess.Popen(  # noqa: S603 - our own module
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**environment, "HOME": str(folder.resolve())},
            start_new_session=True,  # a Ctrl-C at the terminal is the run's to handle
        )

    def _ask(self, what: str, given: Mapping[str, Any]) -> None:
        """Have the client do it. Raises SinkError with what it answers, SinkLost when the process is gone."""
        process = self._process
        assert process is not None, "opened first"
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        try:
            process.stdin.write(json.dumps({"do": what, "with": given}).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # a broken pipe
            answer = b""
        if not answer.endswith(b"\n"):
            _kill(process)
            process.wait()
            raise SinkLost(self._hidden(f"its process has ended; {self._last_words()}"))
        error = json.loads(answer)["error"]
        if error is not None:
            raise SinkError(self._hidden(error))

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what could not be written any more
                pipe.close() if pipe is not None else None

    def _last_words(self) -> str:
        said = self._log.read_text(errors="replace")[-2000:].strip().splitlines()
        return f"the last line of {FOLDER}/{self._log.name}: {said[-1]}" if said else "it said nothing"

    def _hidden(self, text: str) -> str:
        return text.replace(self._secret, "…") if self._secret else text


def judge(url: str, guard: Guard) -> None:
    """Raise SinkError unless every address that the name in `url` has just now may be called."""
    base = httpx2.URL(url)
    host, port = base.raw_host.decode(), base.port or {"http": 80, "https": 443}[base.scheme]

    async def resolved() -> Sequence[str]:
        return await guard.resolve(host, port)

    try:
        for text in asyncio.run(resolved()):
            guard.admit(base, ipaddress.ip_address(text))
    except socket.gaierror:
        raise SinkError(f"{host} does not resolve") from None
    except TargetRefused as error:
        raise SinkError(f"{host}: {error}") from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and what it has started in its session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
