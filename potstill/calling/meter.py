"""Meter: how many tokens a paid teacher has read and written, what they cost, and when to stop.

A request is reserved before it is sent, at the most it can cost, and settled when it was answered, at what it did cost:
so the ceiling holds however many requests are in flight. Sums are integers of 10⁻¹² dollars, the price of one token
where a million cost micro-dollars: nothing is ever rounded. It sends nothing and knows no tokenizer.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from potstill.errors import BudgetExhausted, ConfigError
from potstill.journal import write_json

_PICO = 10**12  # pico-dollars in a dollar
_COUNTERS = ("requests", "tokens_in", "tokens_out", "cost_pico_usd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Dollars per million tokens, as a price list has them, e.g. Decimal("0.15"). At most six decimals."""

    usd_per_million_in: Decimal
    usd_per_million_out: Decimal

    def __post_init__(self) -> None:
        for name in ("usd_per_million_in", "usd_per_million_out"):
            price = getattr(self, name)
            if not price.is_finite() or price < 0 or price * 10**6 % 1:
                raise ConfigError(f"{name}: {price} is not a price: write 0 or more, with at most six decimals")

    def pico_usd(self, tokens_in: int, tokens_out: int) -> int:
        """Exact: dollars per million tokens, times 10⁶, are pico-dollars per token."""
        each_in, each_out = (int(price * 10**6) for price in (self.usd_per_million_in, self.usd_per_million_out))
        return tokens_in * each_in + tokens_out * each_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a run may use of a teacher. None is no ceiling, and is written out by whoever wants none."""

    usd: Decimal | None
    tokens: int | None  # read and written together

    def __post_init__(self) -> None:
        if self.usd is not None and not (self.usd.is_finite() and self.usd >= 0):
            raise ConfigError(f"usd: {self.usd} is not a budget: write 0 or more")
        if self.tokens is not None and self.tokens < 0:
            raise ConfigError(f"tokens: {self.tokens} is not a budget: write 0 or more")


class Meter:
    """Counts in `path`, and goes on from what is there. Safe between tasks and threads; one process owns the file.

    What was reserved when a process died is not counted, although the teacher may have billed it.
    """

    def __init__(self, prices: Prices, budget: Budget, path: Path) -> None:
        self._prices = prices
        self._budget = budget
        self._path = path
        self._lock = threading.Lock()
        self._spent = _read(path)
        self._reserved_tokens = self._reserved_pico_usd = 0

    def reserve(self, tokens_in: int, max_tokens_out: int) -> Reservation:
        """Set aside what a request may cost. Raises BudgetExhausted when that is more than there is left."""
        _require_counts(tokens_in, max_tokens_out)
        tokens, pico_usd = tokens_in + max_tokens_out, self._prices.pico_usd(tokens_in, max_tokens_out)
        with self._lock:
            taken_tokens = self._spent["tokens_in"] + self._spent["tokens_out"] + self._reserved_tokens
            taken_pico_usd = self._spent["cost_pico_usd"] + self._reserved_pico_usd
            if self._budget.tokens is not None and taken_tokens + tokens > self._budget.tokens:
                raise BudgetExhausted(
                    f"the teacher's budget is {self._budget.tokens} tokens, {taken_tokens} are spent or reserved, "
                    f"and the next request may take {tokens}: raise the budget to go on"
                )
            if self._budget.usd is not None and taken_pico_usd + pico_usd > self._budget.usd * _PICO:
                raise BudgetExhausted(
                    f"the teacher's budget is {self._budget.usd} USD, {_usd(taken_pico_usd)} are spent or reserved, "
                    f"and the next request may cost {_usd(pico_usd)}: raise the budget to go on"
                )
            self._reserved_tokens += tokens
            self._reserved_pico_usd += pico_usd
        return Reservation(self, tokens, pico_usd)

    def totals(self) -> dict[str, Any]:
        """For reports: requests, tokens and dollars so far; dollars are decimal strings, exact."""
        with self._lock:
            return {
                "requests": self._spent["requests"],
                "tokens_in": self._spent["tokens_in"],
                "tokens_out": self._spent["tokens_out"],
                "cost_usd": _usd(self._spent["cost_pico_usd"]),
                "reserved_usd": _usd(self._reserved_pico_usd),
                "budget_usd": None if self._budget.usd is None else str(self._budget.usd),
                "budget_tokens": self._budget.tokens,
            }

    def _give_back(self, tokens: int, pico_usd: int) -> None:
        with self._lock:
            self._reserved_tokens -= tokens
            self._reserved_pico_usd -= pico_usd

    def _turn(self, tokens: int, pico_usd: int, tokens_in: int, tokens_out: int) -> int:
        """What was reserved becomes what was spent, in one step; on disk when it returns."""
        cost = self._prices.pico_usd(tokens_in, tokens_out)
        with self._lock:
            self._reserved_tokens -= tokens
            self._reserved_pico_usd -= pico_usd
            self._spent["requests"] += 1
            self._spent["tokens_in"] += tokens_in
            self._spent["tokens_out"] += tokens_out
            self._spent["cost_pico_usd"] += cost
            write_json(self._path, self._spent)
        return cost


class Reservation:
    """What one request may cost. As a context manager it is released on leaving, unless it was settled."""

    def __init__(self, meter: Meter, tokens: int, pico_usd: int) -> None:
        self._meter = meter
        self._held = (tokens, pico_usd)
        self._is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def settle(self, tokens_in: int, tokens_out: int) -> str:
        """Count what the teacher says it read and wrote, also where that is more than was reserved.

        Returns its cost in dollars, as a decimal string.
        """
        _require_counts(tokens_in, tokens_out)
        if not self._is_open:
            raise ValueError("this reservation was settled or released before")
        self._is_open = False
        return _usd(self._meter._turn(*self._held, tokens_in, tokens_out))

    def release(self) -> None:
        """Give back what was reserved: the request cost nothing. Once is enough; again does nothing."""
        if self._is_open:
            self._is_open = False
            self._meter._give_back(*self._held)


def spent_file(folder: Path, teacher: str, worker: int) -> Path:
    """Where a worker of the run in `folder` counts what a teacher costs it."""
    return folder / f"spent-{teacher}-{worker}.json"


def spent_in(folder: Path) -> tuple[int, float] | None:
    """(tokens read and written, dollars) of all workers of the run in `folder`; None where nobody counts any."""
    counted = [json.loads(path.read_bytes()) for path in folder.glob("spent-*.json")]  # replaced whole, never torn
    if not counted:
        return None
    tokens = sum(one["tokens_in"] + one["tokens_out"] for one in counted)
    return tokens, sum(one["cost_pico_usd"] for one in counted) / _PICO


def _read(path: Path) -> dict[str, int]:
    if not path.exists():
        return dict.fromkeys(_COUNTERS, 0)
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    sound = isinstance(found, dict) and set(found) == set(_COUNTERS)
    if not sound or not all(type(count) is int and count >= 0 for count in found.values()):
        raise ConfigError(f"{path} does not hold what a teacher has cost so far: restore it, or move it away")
    return {name: found[name] for name in _COUNTERS}


def _require_counts(*counts: int) -> None:
    if any(count < 0 for count in counts):
        raise ValueError(f"token counts must not be negative: {counts}")


def _usd(pico_usd: int) -> str:
    """Dollars without rounding and without an exponent, e.g. "0.00015"."""
    dollars, rest = divmod(pico_usd, _PICO)
    return f"{dollars}.{rest:012d}".rstrip("0").rstrip(".")
