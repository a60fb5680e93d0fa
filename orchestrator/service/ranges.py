"""Which bytes a Range header asks for: one range of RFC 9110, or a refusal. Pure.

Refuses several ranges in one request (416): each must be checked, sorted and framed, which has been made quadratic
before; whoever wants two parts asks twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from potstill.errors import ServiceError

_ONE = re.compile(r"([0-9]{0,18})-([0-9]{0,18})")


class Unsatisfiable(ServiceError):
    """No byte can be sent for a Range (416). args: message, HTTP status, code, size of the whole."""

    def __init__(self, message: str, status: int, code: str, size: int) -> None:
        super().__init__(message, status, code, size)

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Range": f"bytes */{self.args[3]}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Bytes start … stop - 1 of `size`; `partial` when they were asked for by a Range (206)."""

    start: int
    stop: int
    size: int
    partial: bool

    @property
    def headers(self) -> dict[str, str]:
        found = {"Accept-Ranges": "bytes", "Content-Length": str(self.stop - self.start)}
        return found | ({"Content-Range": f"bytes {self.start}-{self.stop - 1}/{self.size}"} if self.partial else {})


def part(header: str | None, size: int) -> Part:
    """What to send of `size` bytes. Raises Unsatisfiable.

    >>> part("bytes=2-3", 10).headers["Content-Range"], part("bytes=-3", 10).start, part(None, 10).partial
    ('bytes 2-3/10', 7, False)
    """
    unit, separator, ranges = (header or "").partition("=")
    if not separator or unit.strip().lower() != "bytes":  # RFC 9110 14.2: an unknown unit is ignored
        return Part(start=0, stop=size, size=size, partial=False)
    if "," in ranges:
        raise refused("ask for one range at a time", size)
    found = _ONE.fullmatch(ranges.strip())
    if found is None or ranges.strip() == "-":
        raise refused("that is no range of bytes", size)
    first, last = found.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    else:
        start, stop = max(0, size - int(last)), size
    if start >= stop:
        raise refused(f"there are {size} bytes, and none of them in that range", size)
    return Part(start=start, stop=stop, size=size, partial=True)


def refused(message: str, size: int) -> Unsatisfiable:
    """As an error to raise, with the size that a client needs to ask better."""
    return Unsatisfiable(message, 416, "range_not_satisfiable", size)
