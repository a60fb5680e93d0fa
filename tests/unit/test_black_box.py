"""BlackBox: asked once for the same thing, never beyond its budget, and counting on from where it stopped."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import BudgetExhausted, ConfigError, NoAnswer, TeacherRefused, TeacherUnavailable
from potstill.teachers.black_box import together
from potstill.teachers.cache import Paid
from potstill.types import Message, Prompt
from tests.chat_server import USAGE, chat_server, opened, says

PRICES = {"price_in": 1.0, "price_out": 2.0}  # dollars a million tokens
FRAME = 64  # tokens that are reserved for a message's role and template


def make_prompt(number: int = 0, *, answer: str | None = "21") -> Prompt:
    question = Message(role="user", content=f"{number} + 9 = ?")
    return Prompt(id=f"train-{number}", index=number, messages=(question,), domain="d", answer=answer, solution=None)


def texts(answers: list[Paid]) -> list[str]:
    return [answer.text for answer in answers]


def usd(tokens_in: int, tokens_out: int) -> Decimal:
    return (tokens_in * Decimal(1) + tokens_out * Decimal(2)) / 10**6


async def test_a_question_is_sent_in_the_words_of_the_instruction_with_every_sampling_parameter(tmp_path: Path):
    with chat_server(lambda text: says(f"to {text}")) as server:
        table = {"instruction": "Explain {answer} of {prompt}", "temperature": 0.5, "max_tokens": 7}
        async with opened(server, tmp_path, **table) as box:
            assert texts(await box.answers([make_prompt()])) == ["to Explain 21 of 0 + 9 = ?"]
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["max_tokens"], body["n"]) == ("m", 0.5, 7, 1)


async def test_an_instruction_that_wants_what_a_prompt_does_not_have_is_named_and_nothing_is_sent(tmp_path: Path):
    with chat_server(says) as server:
        async with opened(server, tmp_path, instruction="{prompt} {answer}") as box:
            with pytest.raises(ConfigError, match=r"teacher\.instruction wants \{answer\}, which prompt train-1"):
                await box.answers([make_prompt(), make_prompt(1, answer=None)])
    assert server.count == 0


async def test_an_answer_is_kept_for_later_runs_and_paid_for_once(tmp_path: Path):
    with chat_server(says) as server:
        async with opened(server, tmp_path, **PRICES) as box:
            first = await box.answers([make_prompt()])
        async with opened(server, tmp_path, number=1, **PRICES) as box:
            assert await box.answers([make_prompt()]) == first
            assert (box.totals["answers_kept"], box.totals["answers_asked"], box.totals["cost_usd"]) == (1, 0, "0")
    assert server.count == 1


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"max_tokens": 3}, {"instruction": "Say {prompt}"}])
async def test_another_question_is_asked_anew(tmp_path: Path, change: dict[str, Any]):
    with chat_server(says) as server:
        for table in ({}, change):
            async with opened(server, tmp_path, **table) as box:
                await box.answers([make_prompt()])
    assert server.count == 2


async def test_a_question_that_many_ask_at_once_is_sent_once(tmp_path: Path):
    with chat_server(says, takes_s=0.05) as server:
        async with opened(server, tmp_path) as box:
            answers = await box.answers([make_prompt()] * 20)
    assert (server.count, len(answers), len(set(texts(answers)))) == (1, 20, 1)
    assert (box.totals["answers_asked"], box.totals["answers_kept"]) == (1, 19)


async def test_what_is_counted_is_charged(tmp_path: Path):
    with chat_server(says) as server:
        async with opened(server, tmp_path, **PRICES) as box:
            (answer,) = await box.answers([make_prompt()])
    assert (answer.tokens_in, answer.tokens_out, Decimal(answer.cost_usd)) == (17, 3, usd(17, 3))
    assert Decimal(box.totals["cost_usd"]) == usd(17, 3)


async def test_what_is_not_counted_is_charged_at_the_most_that_it_may_have_cost(tmp_path: Path):
    with chat_server(lambda text: says(text, usage=None)) as server:
        async with opened(server, tmp_path, max_tokens=40, **PRICES) as box:
            (answer,) = await box.answers([make_prompt()])
    read = len("0 + 9 = ?") + FRAME
    assert (answer.tokens_in, answer.tokens_out, Decimal(answer.cost_usd)) == (read, 40, usd(read, 40))


@pytest.mark.parametrize("said", [says(""), says(None), says("I will not", finish_reason="content_filter")])
async def test_what_is_no_answer_is_refused_and_charged_and_asked_for_again(tmp_path: Path, said: Any):
    with chat_server(lambda text: said) as server:
        async with opened(server, tmp_path, **PRICES) as box:
            for asked in (1, 2):
                with pytest.raises(NoAnswer):
                    await box.answers([make_prompt()])
                assert (server.count, Decimal(box.totals["cost_usd"])) == (asked, asked * usd(17, 3))


@pytest.mark.parametrize(("status", "error"), [(400, TeacherRefused), (401, TeacherRefused), (503, TeacherUnavailable)])
async def test_a_request_that_failed_costs_nothing(tmp_path: Path, status: int, error: type[Exception]):
    with chat_server(lambda text: (status, {"error": {"message": "no"}})) as server:
        async with opened(server, tmp_path, deadline_s=1.0 if status == 503 else 9.0, budget=1.0, **PRICES) as box:
            with pytest.raises(error, match=str(status)):
                await box.answers([make_prompt()])
    assert (box.totals["cost_usd"], box.totals["reserved_usd"]) == ("0", "0")


async def test_thirty_at_once_never_cost_more_than_the_budget(tmp_path: Path):
    most = usd(len("10 + 9 = ?") + FRAME, 50)  # what one of them may cost
    budget = 7 * most
    with chat_server(lambda text: says(text, usage=None), takes_s=0.01) as server:
        async with opened(server, tmp_path, max_tokens=50, concurrency=30, budget=float(budget), **PRICES) as box:
            with pytest.raises(BudgetExhausted, match="raise the budget"):
                await box.answers([make_prompt(number) for number in range(10, 40)])
            assert server.count == 7
            assert Decimal(box.totals["cost_usd"]) == budget
            kept = await box.answers([make_prompt(number) for number in range(10, 17)])
    assert (len(kept), server.count) == (7, 7)


async def test_counting_goes_on_from_what_was_spent(tmp_path: Path):
    budget = float(2 * usd(len("0 + 9 = ?") + FRAME, 50))
    table = {"max_tokens": 50, "budget": budget, **PRICES}
    with chat_server(lambda text: says(text, usage=None)) as server:
        async with opened(server, tmp_path, **table) as box:
            await box.answers([make_prompt(0)])
        async with opened(server, tmp_path, **table) as box:
            await box.answers([make_prompt(1)])
            with pytest.raises(BudgetExhausted):
                await box.answers([make_prompt(2)])
    assert box.totals["requests"] == server.count == 2
    assert json.loads((tmp_path / "runs" / "one" / "spent-0.json").read_text())["requests"] == 2


async def test_workers_share_a_budget_out(tmp_path: Path):
    budget = float(3 * usd(len("0 + 9 = ?") + FRAME, 50))
    table = {"max_tokens": 50, "budget": budget, "workers": 3, **PRICES}
    with chat_server(lambda text: says(text, usage=None)) as server:
        for number in range(3):
            async with opened(server, tmp_path, number=number, **table) as box:
                await box.answers([make_prompt(2 * number)])
                with pytest.raises(BudgetExhausted):
                    await box.answers([make_prompt(2 * number + 1)])
    assert server.count == 3


async def test_an_answer_that_is_under_way_when_another_fails_is_kept(tmp_path: Path):
    def answer(text: str) -> Any:
        return (400, {"error": {"message": "no"}}) if text.startswith("0 ") else says(text)

    with chat_server(answer, takes_s=0.02) as server:
        async with opened(server, tmp_path) as box:
            with pytest.raises(TeacherRefused):
                await box.answers([make_prompt(0), make_prompt(1)])
            await box.answers([make_prompt(1)])
    assert server.count == 2


async def test_results_of_all_come_in_their_order_and_the_first_failure_after_all_have_ended():
    ended: list[int] = []

    async def one(number: int) -> int:
        await asyncio.sleep(0.01 * (3 - number))
        ended.append(number)
        if number == 2:
            raise ValueError("two")
        return number

    assert await together(one(number) for number in (0, 1)) == [0, 1]
    with pytest.raises(ValueError, match="two"):
        await together(one(number) for number in (0, 1, 2))
    assert ended == [1, 0, 2, 1, 0]


async def test_no_more_requests_are_in_flight_than_the_config_says(tmp_path: Path):
    with chat_server(says, takes_s=0.01) as server:
        async with opened(server, tmp_path, concurrency=2) as box:
            await box.answers([make_prompt(number) for number in range(8)])
    assert (server.count, server.most_in_flight) == (8, 2)
    assert USAGE["prompt_tokens"] * 8 == box.totals["tokens_in"]
