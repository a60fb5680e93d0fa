"""A disk that is full or refuses is one RunError that names the folder and says what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from potstill.errors import RunError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into a RunError that names the folder and the fix."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number is None:
            raise
        if number in _FULL:
            problem = f"disk is full: free space and resume; {path.name} was not written"
        else:
            problem = f"{path.name} cannot be written ({os.strerror(number)}): mend that and resume"
        raise RunError(f"{path.parent}: {problem}") from error


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's error number, which safetensors passes on in words; None: it is not the system that refused."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
