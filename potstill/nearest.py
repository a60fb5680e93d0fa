"""What a misspelt name may have meant, for the end of an error line. No guess is ever acted upon."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(word: str, known: Iterable[str]) -> str:
    """The names near to `word` as a question, or all known names when none is near; begins with a semicolon."""
    names = list(known)
    near = " or ".join(repr(name) for name in similar(word, names))
    return f"; did you mean {near}?" if near else f"; known: {', '.join(names)}"


def similar(word: str, known: Iterable[str]) -> list[str]:
    """At most two: similarity of letters alone takes `eas` for betas before eps."""
    return difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
