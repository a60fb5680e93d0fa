"""A privileged context that fades as the run goes on: first all of it, in the end nothing (SKIntern, arXiv 2409.13183).

Knows no prompt and no template: when nothing is left, the caller shows the plain prompt.
"""

from __future__ import annotations

import re

_ENDS = re.compile(r"[.!?][\"')\]]*(?=\s)|(?=\n)|\Z")


def share(step: int, *, decay_steps: int) -> float:
    """k = 1 − t/T of step `step`, counted from 1, with t = step − 1: 1 at first, 0 from step decay_steps + 1 on."""
    return max(0.0, 1 - (step - 1) / decay_steps)


def faded(context: str, *, share: float) -> str:
    """The first round(share · n) of its n sentences or lines: a worked solution loses its answer before its idea.

    SKIntern ranks what to keep with a prompt compressor; here the order of the text is the rank.

    >>> faded("Add the tens. Add the ones. It is 21.", share=0.5)
    'Add the tens. Add the ones.'
    >>> faded("Add the tens. Add the ones. It is 21.", share=0.0)
    ''
    """
    pieces, start = [], 0
    for end in (match.end() for match in _ENDS.finditer(context)):
        if context[start:end].strip():
            pieces.append(end)
        start = end
    kept = round(share * len(pieces))
    return context[: pieces[kept - 1]] if kept else ""
