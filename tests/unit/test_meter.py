"""The meter: exact sums, a ceiling that holds under races, and totals that outlive the process."""

from __future__ import annotations

import asyncio
import json
import random
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest

from potstill.calling.meter import Budget, Meter, Prices
from potstill.errors import BudgetExhausted, ConfigError, TeacherError

PRICES = Prices(usd_per_million_in=Decimal("0.15"), usd_per_million_out=Decimal("0.60"))


def meter(path: Path, *, usd: str | None = None, tokens: int | None = None, prices: Prices = PRICES) -> Meter:
    return Meter(prices, Budget(usd=None if usd is None else Decimal(usd), tokens=tokens), path / "cost.json")


def test_money_is_exact_over_many_small_sums(tmp_path):
    one = meter(tmp_path, prices=Prices(usd_per_million_in=Decimal("0.1"), usd_per_million_out=Decimal("0.000001")))
    for _ in range(300):
        one.reserve(1, 1).settle(1, 1)
    assert one.totals() == {
        "requests": 300,
        "tokens_in": 300,
        "tokens_out": 300,
        "cost_usd": "0.0000300003",
        "reserved_usd": "0",
        "budget_usd": None,
        "budget_tokens": None,
    }


def test_what_is_reserved_counts_until_it_is_settled_at_what_it_was(tmp_path):
    one = meter(tmp_path, usd="0.00075")
    first = one.reserve(1000, 1000)
    assert one.totals()["reserved_usd"] == "0.00075"
    with pytest.raises(BudgetExhausted):
        one.reserve(1, 0)
    assert first.settle(1000, 500) == "0.00045"
    assert (one.totals()["cost_usd"], one.totals()["reserved_usd"]) == ("0.00045", "0")
    one.reserve(0, 500)


def test_what_is_released_costs_nothing(tmp_path):
    one = meter(tmp_path, tokens=10)
    with pytest.raises(KeyError), one.reserve(5, 5):
        raise KeyError
    with one.reserve(5, 5) as reservation:
        reservation.settle(5, 4)
    reservation.release()
    assert (one.totals()["requests"], one.totals()["reserved_usd"]) == (1, "0")
    one.reserve(1, 0)
    with pytest.raises(BudgetExhausted, match="10 are spent or reserved"):
        one.reserve(0, 1)


def test_the_refusal_is_one_line_of_the_teachers_category(tmp_path):
    one = meter(tmp_path, usd="0.01")
    one.reserve(20_000, 0).settle(20_000, 0)
    with pytest.raises(BudgetExhausted) as caught:
        one.reserve(0, 12_000)
    assert str(caught.value) == (
        "the teacher's budget is 0.01 USD, 0.003 are spent or reserved, and the next request may cost 0.0072: "
        "raise the budget to go on"
    )
    assert isinstance(caught.value, TeacherError)
    assert caught.value.category == "teacher"


def test_more_than_was_reserved_is_counted_and_stops_the_next(tmp_path):
    one = meter(tmp_path, tokens=10)
    one.reserve(1, 1).settle(1, 30)
    assert one.totals()["tokens_out"] == 30
    with pytest.raises(BudgetExhausted):
        one.reserve(0, 0)


def test_a_reservation_is_settled_once(tmp_path):
    reservation = meter(tmp_path).reserve(1, 1)
    reservation.settle(1, 1)
    with pytest.raises(ValueError, match="before"):
        reservation.settle(1, 1)


async def test_fifty_tasks_at_once_stay_below_the_ceiling(tmp_path):
    one, refused = meter(tmp_path, tokens=1000), []

    async def ask(number: int) -> None:
        dice = random.Random(number)
        for _ in range(5):
            try:
                with one.reserve(10, 20) as reservation:
                    await asyncio.sleep(dice.uniform(0, 0.002))
                    if dice.random() < 0.8:
                        reservation.settle(10, dice.randrange(21))
            except BudgetExhausted:
                refused.append(number)
            totals = one.totals()
            assert totals["tokens_in"] + totals["tokens_out"] <= 1000

    await asyncio.gather(*(ask(number) for number in range(50)))
    assert refused
    left = 1000 - one.totals()["tokens_in"] - one.totals()["tokens_out"]
    one.reserve(left, 0)  # nothing of what was reserved has been lost
    with pytest.raises(BudgetExhausted):
        one.reserve(0, 1)


def test_threads_at_once_lose_no_count_and_stay_below_the_ceiling(tmp_path):
    one = meter(tmp_path, usd="0.0009")  # 120 requests of 10 tokens in and 10 out

    def ask(number: int) -> int:
        try:
            with one.reserve(10, 10) as reservation:
                reservation.settle(10, 10)
        except BudgetExhausted:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        answered = sum(pool.map(ask, range(200)))
    assert answered == one.totals()["requests"] == 120
    assert one.totals()["cost_usd"] == "0.0009"


def test_a_resumed_run_goes_on_counting(tmp_path):
    meter(tmp_path, tokens=100).reserve(40, 20).settle(40, 20)
    again = meter(tmp_path, tokens=100)
    assert again.totals()["tokens_in"] == 40
    with pytest.raises(BudgetExhausted, match="60 are spent"):
        again.reserve(40, 1)
    again.reserve(40, 0).settle(40, 0)
    assert json.loads((tmp_path / "cost.json").read_text()) == {
        "requests": 2,
        "tokens_in": 80,
        "tokens_out": 20,
        "cost_pico_usd": 24_000_000,
    }


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"requests": 1}', "\x00"])
def test_totals_that_cannot_be_read_are_not_taken_for_zero(tmp_path, content):
    (tmp_path / "cost.json").write_text(content)
    with pytest.raises(ConfigError, match=r"cost\.json"):
        meter(tmp_path)


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "0.0000001"])
def test_what_is_no_price_is_refused(price):
    with pytest.raises(ConfigError, match="usd_per_million_out"):
        Prices(usd_per_million_in=Decimal(0), usd_per_million_out=Decimal(price))


@pytest.mark.parametrize(("usd", "tokens"), [("-1", None), ("nan", None), (None, -1)])
def test_what_is_no_budget_is_refused(tmp_path, usd, tokens):
    with pytest.raises(ConfigError, match="not a budget"):
        meter(tmp_path, usd=usd, tokens=tokens)
