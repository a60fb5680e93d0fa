"""How much a completion repeats itself: how far zlib shrinks its end. Pure; it decides nothing about the rollout."""

from __future__ import annotations

import zlib

TAIL = 10_000  # characters: a loop is where a text ends, and a long sound beginning would hide it


def repetition(text: str) -> float:
    """Bytes of the last 10,000 characters over those of their zlib compression (level 6); 0 for an empty text.

    Prose and mathematics are at 2 to 4; Stable-OPD (arXiv 2604.08527) counts a completion above 10 as a loop. A text
    below about 150 bytes cannot reach that, whatever it says: zlib's own frame is as large as what would be left of it.

    >>> repetition("the cat sat on the mat. ") < 1 < 10 < repetition("the cat sat on the mat. " * 40)
    True
    """
    tail = text[-TAIL:].encode()
    return len(tail) / len(zlib.compress(tail, 6))
