"""What a run does while its teacher is away: it waits, says so, and tries again; not for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from potstill.errors import TeacherUnavailable
from potstill.journal import Journal, Status

PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0

Answer = TypeVar("Answer")


class Patience:
    """One run's, shared by all who call the teacher: it is away from the first failure to the next success."""

    def __init__(self, journal: Journal, *, limit_s: float) -> None:
        self._journal = journal
        self._limit_s = limit_s
        self._since: float | None = None

    async def wait_out(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """The call's answer, however often it takes. Raises TeacherUnavailable when the wait has been too long."""
        pause = PAUSE_S
        while True:
            try:
                answer = await call()
            except TeacherUnavailable as error:
                left_s = self._is_away(error)
                await asyncio.sleep(min(pause, left_s))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._is_back()
                return answer

    def _is_away(self, error: TeacherUnavailable) -> float:
        """How much longer it may be away, in seconds. Raises the error when that was all."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            self._journal.event("teacher.away", f"waiting for the teacher: {error}", level="warn")
            self._journal.status(Status.WAITING_TEACHER)
        elif now - self._since >= self._limit_s:
            raise TeacherUnavailable(
                f"the teacher was away for {self._limit_s:g} s, which is all that loop.teacher_wait_s allows: {error}"
            )
        return self._since + self._limit_s - now

    def _is_back(self) -> None:
        if self._since is not None:
            waited = time.monotonic() - self._since
            self._since = None
            self._journal.event("teacher.back", f"the teacher answers again after {waited:.0f} s", seconds=waited)
            self._journal.status(Status.RUNNING)
