"""The shipped recipes as a form offers them: their names, what each is for, their text."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.errors import ServiceError
from potstill.recipes import folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str
    about: str  # the first comment of its file


def names() -> list[Recipe]:
    files = sorted(folder().glob("*.toml"))
    return [Recipe(name=file.stem, about=_about(file.read_text())) for file in files]


def text(name: str) -> str:
    """Raises ServiceError (404) for a name that no recipe has."""
    for file in folder().glob("*.toml"):
        if file.stem == name:
            return file.read_text()
    raise ServiceError("there is no such recipe", 404, "recipe_not_found")


def _about(content: str) -> str:
    first = content.split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
