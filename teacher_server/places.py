"""How many requests, and how many bytes of theirs, the server holds at a time. Used on the event loop only.

A place is taken before anything of a request is read, and given back when its answer is. Whoever finds none is refused
at once with the time to wait: nobody queues for a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from teacher_server.limits import Limits, Refusal


class Place:
    """One request's share."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Count `num_bytes` more for this request, or raise Refusal: 413 if they can never fit, else 503."""
        self._places.reserve(self, num_bytes)


class Places:
    """All requests in flight. `retry_after_s` is asked when one is refused."""

    def __init__(self, limits: Limits, retry_after_s: Callable[[], int]) -> None:
        self._limits = limits
        self._retry_after_s = retry_after_s
        self.num_requests = 0
        self.num_bytes = 0

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place for one request; raises Refusal when there is none."""
        if self.num_requests >= self._limits.inflight_requests:
            raise self._overloaded("too many requests are in flight; try again later")
        place = Place(self)
        self.num_requests += 1
        try:
            yield place
        finally:
            self.num_requests -= 1
            self.num_bytes -= place.num_bytes

    def reserve(self, place: Place, num_bytes: int) -> None:
        if place.num_bytes + num_bytes > self._limits.inflight_bytes:
            message = f"body and answer together are larger than {self._limits.inflight_bytes} bytes; ask in parts"
            raise Refusal(413, "request_too_large", message)
        if self.num_bytes + num_bytes > self._limits.inflight_bytes:
            raise self._overloaded("too many bytes are in flight; try again later")
        place.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def _overloaded(self, message: str) -> Refusal:
        return Refusal(503, "overloaded", message, retry_after_s=self._retry_after_s())
