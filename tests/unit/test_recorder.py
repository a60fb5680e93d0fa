"""What a run says of itself is what was measured, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.recorder import Recorder
from potstill.config import LoopConfig
from potstill.journal import Journal, read_jsonl
from potstill.types import FinishReason, StepBatch, StepReport
from tests.receipts import make_receipt


def make_recorder(folder: Path, *, steps: int = 3, max_train_tokens: int | None = None) -> Recorder:
    config = LoopConfig(steps=steps, max_train_tokens=max_train_tokens)
    return Recorder(journal=Journal(folder), config=config)


def make_batch(step: int, *receipts: Any) -> StepBatch:
    receipts = receipts or (make_receipt(step),)
    tokens = sum(receipt.num_loss_tokens - receipt.num_unscored_tokens for receipt in receipts)
    return StepBatch(step=step, receipts=receipts, num_loss_tokens=tokens, num_sequences=len(receipts))


def record(recorder: Recorder, batch: StepBatch, **metrics: float) -> None:
    recorder.step(batch, StepReport(step=batch.step, metrics=metrics, seconds={}), num_waiting=7)


def lines(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "metrics.jsonl"))


def test_steps_are_counted_from_one_to_the_last(tmp_path: Path):
    assert list(make_recorder(tmp_path, steps=3).steps()) == [1, 2, 3]


def test_steps_end_after_the_step_that_uses_up_the_tokens(tmp_path: Path):
    recorder = make_recorder(tmp_path, steps=9, max_train_tokens=6)
    for step in recorder.steps():
        record(recorder, make_batch(step))
    assert (recorder.steps_done, recorder.tokens_trained) == (2, 10)


def test_a_line_holds_the_learners_metrics_and_the_rollouts(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    next(iter(recorder.steps()))
    cut = make_receipt(1, version=1, tokens=20, unscored=5, reward=0.0, finish_reason=FinishReason.LENGTH)
    record(recorder, make_batch(3, make_receipt(0, version=2, tokens=10), cut), loss=0.5)
    (line,) = lines(tmp_path)
    assert (
        line.items()
        >= {
            "step": 3,
            "loss": 0.5,
            "accuracy": 0.5,
            "completion_tokens": 15.0,
            "truncated_fraction": 0.5,
            "unscored_fraction": 5 / 30,
            "staleness_mean": 0.5,
            "staleness_max": 1.0,
            "worker_seconds_generate": 0.2,
            "worker_seconds_score": 0.4,
            "tokens_trained": 25,
            "queue": 7,
            "weights_version": 3,
        }.items()
    )
    assert line["tokens_per_second"] == pytest.approx(25 / line["seconds_step"])


def test_an_age_that_nobody_has_is_left_out(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    next(iter(recorder.steps()))
    record(recorder, make_batch(1, make_receipt(0, version=-1)))
    assert not any(name.startswith("staleness") for name in lines(tmp_path)[0])


def test_an_accuracy_that_nothing_could_judge_is_missing_not_zero(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    next(iter(recorder.steps()))
    record(recorder, make_batch(1, make_receipt(0, reward=math.nan)))
    assert lines(tmp_path)[0]["accuracy"] is None


def test_seconds_are_of_the_step_in_its_line_and_of_the_run_in_the_sum(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    for step in recorder.steps():
        with recorder.waiting_for("train"):
            sum(range(10_000))
        record(recorder, make_batch(step))
    of_steps = [line["seconds_train"] for line in lines(tmp_path)]
    assert all(seconds > 0 for seconds in of_steps)
    assert recorder.seconds["train"] == pytest.approx(sum(of_steps))
    assert all(line["seconds_step"] >= line["seconds_train"] for line in lines(tmp_path))


def test_time_is_counted_when_what_was_waited_for_fails(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    with pytest.raises(ZeroDivisionError), recorder.waiting_for("train"):
        _ = 1 / 0
    assert recorder.seconds["train"] > 0


def test_the_first_and_the_last_line_are_remembered_for_the_report(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    for step in recorder.steps():
        record(recorder, make_batch(step), reverse_kl=float(step))
    assert recorder.reverse_kl == [1.0, 2.0, 3.0]
