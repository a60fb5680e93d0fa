"""What a run's paid teachers cost, added up over its workers. Pure: dollars stay exact, as decimal text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

_COUNTED = ("requests", "tokens_in", "tokens_out", "answers_asked", "answers_kept")
_PLACES = 12  # of a dollar, as the meter counts


def in_all(by_worker: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By teacher, the totals of BlackBox of all workers; empty where nobody is paid.

    Example: {"teacher": {"requests": 6, "tokens_in": 120, …, "cost_usd": "0.0012", "budget_usd": "1"}}
    """
    names = dict.fromkeys(name for boxes in by_worker.values() for name in boxes)
    return {name: _sum([boxes[name] for boxes in by_worker.values() if name in boxes]) for name in names}


def _sum(totals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    budgets = [one["budget_usd"] for one in totals]  # a share each
    return {
        **{count: sum(one[count] for one in totals) for count in _COUNTED},
        "cost_usd": _dollars(one["cost_usd"] for one in totals),
        "budget_usd": None if None in budgets else _dollars(budgets),
    }


def _dollars(amounts: Iterable[str]) -> str:
    """Their sum without an exponent, e.g. "0.00015"."""
    whole = round(sum((Decimal(amount) for amount in amounts), Decimal(0)), _PLACES)
    return f"{whole:f}".rstrip("0").rstrip(".")
