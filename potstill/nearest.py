"""What a misspelt name may have meant, for the end of an error line. No guess is ever acted upon."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(word: str, known: Iterable[str], *, most: int | None = None) -> str:
    """The names near to `word` as a question, or the known names when none is near; begins with a semicolon.

    `most`: of the known names, so many are shown at most.
    """
    names = list(known)
    near = " or ".join(repr(name) for name in similar(word, names))
    if near:
        return f"; did you mean {near}?"
    shown = names if most is None else names[:most]
    return f"; known: {', '.join(shown) or 'none'}" + (", …" if len(shown) < len(names) else "")


def similar(word: str, known: Iterable[str]) -> list[str]:
    """At most two: similarity of letters alone takes `eas` for betas before eps."""
    return difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
