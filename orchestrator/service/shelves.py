"""Shelves: folders of the operator's whose content clients may name, and the one way from a name to a place.

A name is letters, digits, `.`, `_` and `-`, in up to four parts between slashes, none of which begins with a dot.
Refuses everything else, and whatever a link would take out of the folder: a place is resolved first and compared then.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_LISTED = 1000
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_PARTS = 4
_NAME = re.compile(rf"{_PART}(/{_PART}){{0,{_PARTS - 1}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a name stands for: a resolved place, and the resolved folder that it is in."""

    path: Path
    root: Path


class Shelf:
    """`holds` tells of a resolved place whether it is one of the things that this shelf is for.

    Of several roots, the first that has a name decides what it means.
    """

    def __init__(self, roots: Sequence[Path], holds: Callable[[Path], bool]) -> None:
        self.roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._holds = holds

    def find(self, name: str) -> Found | None:
        """None for what is no name, is not there, is something else, or lies outside."""
        if not is_name(name):
            return None
        for root in self.roots:
            path = inside(root, name)
            if path is not None and self._holds(path):
                return Found(path=path, root=root)
        return None

    def names(self) -> list[str]:
        """What there is, in order; at most MOST_LISTED."""
        found: dict[str, None] = {}
        for root in self.roots:
            for name in self._below(root, "", _PARTS):
                found[name] = None
                if len(found) == MOST_LISTED:
                    return sorted(found)
        return sorted(found)

    def _below(self, root: Path, prefix: str, parts: int) -> Iterator[str]:
        for entry in _entries(root / prefix):
            name = f"{prefix}{entry}"
            path = inside(root, name) if is_name(name) else None
            if path is None:
                continue
            if self._holds(path):
                yield name
            elif parts > 1 and path.is_dir():
                yield from self._below(root, f"{name}/", parts - 1)


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and ".." not in text


def inside(root: Path, name: str) -> Path | None:
    """The resolved place of `name` below the resolved folder `root`; None when it is not there, or leads out of it."""
    try:
        path = Path(os.path.realpath(root / name, strict=True))
    except OSError:
        return None
    return path if path != root and path.is_relative_to(root) else None


def is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


def is_tokenizer(path: Path) -> bool:
    return (path / "tokenizer_config.json").is_file()


def is_prompts(path: Path) -> bool:
    return path.suffix == ".jsonl" and path.is_file()


def _entries(folder: Path) -> list[str]:
    """Names in a folder, in order; none of one that cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
