"""A pickle that tells when it is unpickled: it makes a folder."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Canary:
    """Unpickled, it makes the folder `sang`."""

    def __init__(self, sang: Path) -> None:
        self._sang = sang

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._sang),)


def canary(sang: Path, protocol: int = pickle.HIGHEST_PROTOCOL) -> bytes:
    return pickle.dumps(Canary(sang), protocol=protocol)
