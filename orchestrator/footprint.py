"""Peak memory of this process and everything it started, sampled once a second.

Proportional set sizes, so that memory shared between processes counts once. Linux; elsewhere resident sizes, which
count it several times.
"""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL_S = 1.0


class Footprint:
    """A context manager; `peak_bytes` grows while it is open."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="footprint", daemon=True)

    def __enter__(self) -> Footprint:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        stopped = False
        while not stopped:
            self.peak_bytes = max(self.peak_bytes, sum(_size(p) for p in [me, *me.children(recursive=True)]))
            stopped = self._stop.wait(INTERVAL_S)


def _size(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except psutil.Error:  # it ended, or is not ours to look into
        return 0
    return int(getattr(full, "pss", full.rss))
