"""A lock that is handed on in the order in which it was asked for; Python's own gives it to whoever is quickest.

Refuses to have a thread wait for itself.
"""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """As a context manager. Raises RuntimeError in a thread that is inside already."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._inside: int | None = None  # the thread whose turn it is
        self._line: deque[tuple[int, threading.Event]] = deque()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._guard:
            if self._inside is None:
                self._inside = me
                return
            if self._inside == me:
                raise RuntimeError("this thread has its turn already")
            mine = threading.Event()
            self._line.append((me, mine))
        mine.wait()

    def __exit__(self, *_error: object) -> None:
        with self._guard:
            if not self._line:
                self._inside = None
                return
            self._inside, next_one = self._line.popleft()
        next_one.set()
