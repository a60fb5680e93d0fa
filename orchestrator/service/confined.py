"""Files below a folder, opened part by part, so that no name and no link can lead out of it.

Every part is opened relative to the folder before it and with O_NOFOLLOW: what is checked and what is opened are the
same thing, also while somebody else changes the folder. The root itself is the operator's and may be reached by links.
Refuses, as if it were not there (FileNotFoundError), every part that is empty, "." or "..", holds a separator or a
null, or is a link, and everything at the end that is neither a plain file nor a folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO}


@contextmanager
def folder(root: Path, *parts: str) -> Iterator[int]:
    """A descriptor of the folder at `parts` below `root`."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            outer, descriptor = descriptor, _open(part, descriptor, os.O_DIRECTORY)
            os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(root: Path, *parts: str) -> BufferedReader:
    """The plain file at `parts` below `root`, for reading. Close it."""
    with folder(root, *parts[:-1]) as inside:
        descriptor = _open(parts[-1], inside, os.O_NONBLOCK)  # a pipe of that name would hold up whoever opens it
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _absent(parts[-1])
    return os.fdopen(descriptor, "rb")


def names(root: Path, *parts: str) -> list[str]:
    """What the folder at `parts` holds, sorted; nothing where there is none."""
    try:
        with folder(root, *parts) as inside:
            return sorted(os.listdir(inside))
    except FileNotFoundError:
        return []


@contextmanager
def taken_away(root: Path, *parts: str) -> Iterator[None]:
    """Have what is at `parts` below `root` gone at once, and its bytes after the block; back again if the block raises.

    What is there may be a folder, a file or a link, which is removed as a link. Raises FileNotFoundError.
    """
    for part in parts:
        _check(part)
    name, hidden = parts[-1], f".{parts[-1]}.{uuid.uuid4().hex[:8]}"  # as durable.sweep knows what is to be removed
    with folder(root, *parts[:-1]) as inside:
        with _absence(name):
            os.rename(name, hidden, src_dir_fd=inside, dst_dir_fd=inside)
        try:
            yield
        except BaseException:
            os.rename(hidden, name, src_dir_fd=inside, dst_dir_fd=inside)
            raise
        _remove(hidden, inside)


def _remove(name: str, inside: int) -> None:
    with suppress(FileNotFoundError):  # somebody who swept has been here
        if stat.S_ISDIR(os.stat(name, dir_fd=inside, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=inside, ignore_errors=True)
        else:
            os.unlink(name, dir_fd=inside)


def _open(part: str, inside: int, flags: int) -> int:
    _check(part)
    with _absence(part):
        return os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=inside)


@contextmanager
def _absence(part: str) -> Iterator[None]:
    """What is of another kind than was asked for, or cannot be named, is not there."""
    try:
        yield
    except OSError as error:
        if error.errno in _ABSENT:
            raise _absent(part) from None
        raise


def _check(part: str) -> None:
    if part in {"", ".", ".."} or "/" in part or "\0" in part:
        raise _absent(part)
    try:
        os.fsencode(part)
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        raise _absent(part) from None


def _absent(part: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), part)
