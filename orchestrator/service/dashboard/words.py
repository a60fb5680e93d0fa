"""How the dashboard says moments and sizes. Pure: the time is an argument, and what is not known is None.

Durations are said by orchestrator.gantt, numbers of a run by potstill.metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A time as a page shows it. Example: Moment(exact="2026-11-29T08:15:00Z", words="3 min ago")."""

    exact: str
    words: str


def moment(seconds: float | None, now: float) -> Moment | None:
    """A time, in seconds since 1970, as seen from `now`."""
    if seconds is None:
        return None
    then = datetime.fromtimestamp(seconds, UTC)
    return Moment(exact=then.strftime("%Y-%m-%dT%H:%M:%SZ"), words=ago(seconds, now))


def ago(seconds: float, now: float) -> str:
    """Example: ago(0.0, 7300.0) == "2 h ago". Beyond a month it is a date. static/times.js says the same."""
    past = now - seconds
    if past < _MINUTE:
        return "just now" if past > -_MINUTE else f"in {_rounded(-past)}"
    if past < 30 * _DAY:
        return f"{_rounded(past)} ago"
    then = datetime.fromtimestamp(seconds, UTC)
    return f"{then.day} {then:%b %Y}"


def left(seconds: float) -> str:
    """Example: left(3700.0) == "about 1 h left"."""
    return "less than a minute left" if seconds < _MINUTE else f"about {_rounded(seconds)} left"


def size(count: int) -> str:
    """Example: size(2_147_483_648) == "2.15 GB"."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count:,} bytes" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


def _rounded(seconds: float) -> str:
    if seconds < _HOUR:
        return f"{max(1, int(seconds // _MINUTE))} min"
    if seconds < 2 * _DAY:
        return f"{int(seconds // _HOUR)} h"
    return f"{int(seconds // _DAY)} days"
