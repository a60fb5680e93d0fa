"""What a run's records say in words: no more than they hold, and nothing that chance or a bad ending takes back."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator import findings

DIED = {"type": "WorkerLost", "category": "system", "message": "the learner's process died"}


def make_evaluation(stage: str, *, accuracy: float, items: int) -> dict[str, Any]:
    return {"type": "eval.finished", "data": {"stage": stage, "accuracy": accuracy, "items": items}}


@pytest.mark.parametrize(
    ("status", "num_steps", "says"),
    [
        ({"status": "failed", "error": DIED}, 7, "The run failed after step 7 of 120: the learner's process died"),
        ({"status": "failed", "error": DIED}, 0, "The run failed before its first step: the learner's process died"),
        ({"status": "failed"}, 7, "The run failed after step 7 of 120: no reason was recorded"),
        ({"status": "cancelled"}, 7, "The run was cancelled after step 7 of 120."),
        ({"status": "running"}, 7, "The run has not ended: it was last seen running, after step 7 of 120."),
        ({}, 0, "The run never started: its folder holds no status."),
        ({"status": "succeeded"}, 7, None),
    ],
)
def test_a_run_without_a_result_says_how_far_it_came_and_why(status: dict[str, Any], num_steps: int, says: str | None):
    metrics = [{"step": step} for step in range(1, num_steps + 1)]
    assert findings.unfinished("The run", status, {"loop": {"steps": 120}}, metrics) == says


def test_evaluations_know_their_tokens_or_say_that_they_do_not():
    before, after = (
        {"type": "eval.finished", "data": {"stage": stage, "accuracy": 0.5}} for stage in ("before", "after")
    )
    found = findings.evaluations([before, after, {"type": "eval.finished", "data": {"accuracy": None}}])
    assert [(item.stage, item.tokens_trained) for item in found] == [("before", 0.0), ("after", None)]


def test_a_change_that_few_items_cannot_show_is_called_chance():
    few, many = (
        [make_evaluation("before", accuracy=0.125, items=items), make_evaluation("after", accuracy=0.2, items=items)]
        for items in (30, 3000)
    )
    assert any("chance" in sentence for sentence in findings.sentences({}, few))
    assert not any("chance" in sentence for sentence in findings.sentences({}, many))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.5, 0.25, "fell from 50.0% to 25.0%"),
        (0.5, 0.5001, "stayed at 50.0%"),
        (0.5, None, "was 50.0% before the run"),
    ],
)
def test_the_headline_does_not_flatter(before: float, after: float | None, words: str):
    assert words in findings.headline({"student_before": before, "student_after": after})


def test_the_gap_is_not_spoken_of_when_the_teacher_is_no_better():
    report = {"student_before": 0.5, "student_after": 0.6, "teacher": 0.4}
    assert findings.sentences(report, []) == ["The teacher scores 40.0%."]
    assert findings.sentences({**report, "teacher": 0.55}, []) == [
        "The teacher scores 55.0%: the student has reached it."
    ]


def test_the_wilson_interval_agrees_with_the_equation_that_defines_it():
    for accuracy, items in ((0.0, 10), (0.3, 50), (1.0, 200)):
        low, high = findings.wilson(accuracy, items)
        inside = [
            p / 1e4
            for p in range(10001)
            if abs(accuracy - p / 1e4) <= 1.96 * math.sqrt(p / 1e4 * (1 - p / 1e4) / items)
        ]
        assert low == pytest.approx(min(inside), abs=2e-4)
        assert high == pytest.approx(max(inside), abs=2e-4)
