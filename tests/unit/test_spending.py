"""What paid teachers cost, summed over workers, and as the report's page says it."""

from __future__ import annotations

from typing import Any

from orchestrator import findings
from orchestrator.spending import in_all


def totals(requests: int, cost_usd: str, budget_usd: str | None = None) -> dict[str, Any]:
    counted = {"requests": requests, "tokens_in": 1000 * requests, "tokens_out": 2 * requests}
    answers = {"answers_asked": requests, "answers_kept": 7}
    return counted | answers | {"cost_usd": cost_usd, "reserved_usd": "0", "budget_usd": budget_usd}


def test_workers_are_added_up_by_teacher_to_the_last_digit():
    third = "0.3333333333333333333333333333"
    workers = {f"worker-{n}": {"teacher": totals(n, f"0.00000000000{n}", third)} for n in (1, 2, 3)}
    assert in_all(workers) == {
        "teacher": {
            "requests": 6,
            "tokens_in": 6000,
            "tokens_out": 12,
            "answers_asked": 6,
            "answers_kept": 21,
            "cost_usd": "0.000000000006",
            "budget_usd": "1",
        }
    }


def test_a_run_that_pays_nobody_has_spent_nothing_to_speak_of():
    assert in_all({}) == in_all({"worker-0": {}}) == {}
    assert not any(name.startswith("paid") for name, _ in findings.facts({}))


def test_what_costs_nothing_is_zero_dollars_and_no_budget_is_none():
    found = in_all({"worker-0": {"advisor": totals(0, "0")}})["advisor"]
    assert (found["cost_usd"], found["budget_usd"]) == ("0", None)


def test_the_page_says_what_was_paid():
    report = {"teacher_spent": in_all({"worker-0": {"advisor": totals(3, "0.25")}})}
    said = "0.25 USD, 3,000 tokens read, 6 written; 3 answers asked for, 7 known before"
    assert ("paid for the advisor", said) in findings.facts(report)
