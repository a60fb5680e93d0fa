"""Breaker: when to stop asking somebody who does not answer, and when to try once more.

    closed      everybody may ask; `failures_to_open` failures in a row open it
    open        nobody may ask for `cool_down_s`
    half-open   one may ask, the probe: its success closes the breaker, its failure opens it anew

After Nygard, Release It! (2007). It sends nothing, sleeps nowhere, and reads the clock that it is given.
"""

from __future__ import annotations

from collections.abc import Callable


class Breaker:
    """One per endpoint. Whoever `admit` let through says how it went: `succeeded`, `failed` or `abandoned`."""

    def __init__(self, *, failures_to_open: int, cool_down_s: float, clock: Callable[[], float]) -> None:
        if failures_to_open < 1:
            raise ValueError(f"failures_to_open must be at least 1, not {failures_to_open}")
        self._failures_to_open = failures_to_open
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._failures = 0  # in a row
        self._opened_at: float | None = None
        self._probing = False

    @property
    def state(self) -> str:
        """ "closed", "open" or "half-open"."""
        if self._opened_at is None:
            return "closed"
        return "open" if self.open_for_s() > 0 else "half-open"

    @property
    def failures(self) -> int:
        return self._failures

    def open_for_s(self) -> float:
        """Seconds until a probe may be sent; 0.0 unless the breaker is open."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._cool_down_s - self._clock())

    def admit(self) -> bool:
        """May a request be sent now? In half-open only the first that asks may, until it is known how that went."""
        if self._opened_at is None:
            return True
        if self._probing or self.open_for_s() > 0:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._opened_at = None
        self._probing = False

    def failed(self) -> None:
        self._failures += 1
        if self._probing or self._failures == self._failures_to_open:
            self._opened_at = self._clock()
        self._probing = False

    def abandoned(self) -> None:
        """It is not known how the request would have gone: its sender gave it up."""
        self._probing = False
