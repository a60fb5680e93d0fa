"""A line between two processes over which both say small JSON objects. It ends with either of them, at once.

Whoever answers and whoever calls prove to each other that they know the same key, before anything is said; bytes that
come over a line are never unpickled. What is said, and when, is device.py's and learner/outbox.py's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

CALL_S = 30.0  # for a connection to be made
LONGEST = 1 << 20  # bytes of one object


class Line:
    """One end. `say` and `hear` raise OSError or EOFError once the other end is gone."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(None)
        self.here = str(connected.getsockname()[0])  # our own address, as the other reaches it
        self._connection: Connection = Connection(connected.detach())

    @classmethod
    def call(cls, host: str, port: int, key: bytes) -> Line:
        """Raises OSError where nobody answers, AuthenticationError where somebody else does."""
        line = cls(socket.create_connection((host, port), timeout=CALL_S))
        answer_challenge(line._connection, key)
        deliver_challenge(line._connection, key)
        return line

    def admit(self, key: bytes) -> None:
        """The answering side of `call`. Raises AuthenticationError for a caller without the key."""
        deliver_challenge(self._connection, key)
        answer_challenge(self._connection, key)

    def say(self, **words: Any) -> None:
        self._connection.send_bytes(json.dumps(words).encode())

    def hear(self, patience_s: float | None) -> dict[str, Any]:
        """Raises TimeoutError when nothing is said for so long."""
        if not self._connection.poll(patience_s):
            raise TimeoutError(f"nothing was heard for {patience_s:g} s")
        words: dict[str, Any] = json.loads(self._connection.recv_bytes(LONGEST))
        return words

    def over(self, within_s: float = 0.0) -> str | None:
        """Why the line is of no more use, where it is: the other end is gone, or says what it failed of."""
        try:
            if not self._connection.poll(within_s):
                return None
            return str(self.hear(0.0).get("failed", "it said something unexpected"))
        except (OSError, EOFError):
            return "it is gone"

    def hang_up(self) -> None:
        """From any thread: whoever is waiting to hear something is woken, here and there.

        The descriptor is closed with the last reference, and not before: another thread may still be reading from it.
        """
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as own:
            own.shutdown(socket.SHUT_RDWR)
