"""The shipped recipes as a form offers them: their names, what each is for, their text."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from potstill.errors import ServiceError
from potstill.recipes import folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str
    about: str  # the comment that its file begins with, up to what is indented in it


FIRST = "served"  # the one that a service takes as it is


def names() -> list[Recipe]:
    """FIRST first, the others by name."""
    files = sorted(folder().glob("*.toml"), key=lambda file: (file.stem != FIRST, file.stem))
    return [Recipe(name=file.stem, about=_about(file.read_text())) for file in files]


def text(name: str) -> str:
    """Raises ServiceError (404) for a name that no recipe has."""
    for file in folder().glob("*.toml"):
        if file.stem == name:
            return file.read_text()
    raise ServiceError("there is no such recipe", 404, "recipe_not_found")


def _about(content: str) -> str:
    lines = itertools.takewhile(lambda line: re.match(r"# ?\S", line), content.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)
