"""Whether it was memory that a process of the run ended of, and which settings have it take less.

Who asks for more than there is may be told so, by Python or by torch, and lives on. Or it is ended: by Ray's memory
monitor, which says so, or by the kernel, which only counts whom it ends. We read the count of our own machine; whom the
kernel of another one ends has died of nothing that is known here.
"""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

from potstill.errors import MemoryLost, WorkerLost

COUNTS = Path("/proc/vmstat")
RECENT_S = 5.0  # in which whoever waits for a process hears that it is gone
LOOK_S = 1.0
REFUSALS = ("out of memory", "can't allocate memory", "cannot allocate memory")
ADVICE = {
    "learner": "lower learner.micro_batch_tokens or learner.chunk_tokens, train an adapter (student.lora), or spread "
    "the student over more learner.ranks",
    "rollout worker": "lower rollout.workers, rollout.prompts_per_call, rollout.calls or "
    "rollout.sampling.max_new_tokens",
    "teacher server": "take a smaller teacher.model, or serve it on another machine and name its teacher.url",
}


class Kernel:
    """The kernel of this machine, as far as it has ended processes for their memory. Where it does not count, none."""

    def __init__(self, counts: Path = COUNTS, *, recent_s: float = RECENT_S) -> None:
        self._counts = counts
        self._recent_s = recent_s
        self._ended = self._count()
        self._at = -math.inf

    def has_just_ended_one(self) -> bool:
        """A moment ago, or since somebody looked last."""
        ended, now = self._count(), time.monotonic()
        if ended > self._ended:
            self._ended, self._at = ended, now
        return now - self._at < self._recent_s

    async def watch(self) -> None:
        """Look again and again, so that what was ended long ago is not taken for what has just ended."""
        while True:
            self.has_just_ended_one()
            await asyncio.sleep(LOOK_S)

    def _count(self) -> int:
        if not self._counts.exists():
            return 0
        rows = (line.split() for line in self._counts.read_text().splitlines())
        return next((int(count) for name, count in rows if name == "oom_kill"), 0)


KERNEL = Kernel()


def loss(who: str, gone: type[WorkerLost], how: str, kernel: Kernel = KERNEL) -> WorkerLost:
    """Of a process that is gone without a word: `gone`, or a MemoryLost where the kernel has just ended one."""
    if kernel.has_just_ended_one():
        return MemoryLost(f"{how}; the kernel has just ended a process for its memory: {advice(who)}")
    return gone(how)


def was_refused(error: BaseException) -> bool:
    """Whether this is how Python, torch or the system say that there is no more memory."""
    if isinstance(error, RuntimeError | OSError):
        return any(words in str(error).lower() for words in REFUSALS)
    return isinstance(error, MemoryError)


def advice(who: str) -> str:
    """What to write for a process to take less; `who` may have a number, as in "rollout worker 3"."""
    return ADVICE[who.rstrip(" 0123456789")]
