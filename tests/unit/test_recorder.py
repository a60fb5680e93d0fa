"""What a run says of itself is what was measured, and nothing else."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.recorder import Recorder
from potstill.calling.meter import Budget, Meter, Prices, spent_file
from potstill.config import LoopConfig
from potstill.journal import Journal, read_jsonl, steps_in
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
    report = StepReport(step=batch.step, metrics=metrics, seconds={})
    recorder.step(batch, report, num_waiting=7, num_refused=2)


def lines(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "metrics.jsonl"))


def test_steps_are_counted_from_one_to_the_last(tmp_path: Path):
    assert list(make_recorder(tmp_path, steps=3).steps()) == [1, 2, 3]


def test_steps_end_after_the_step_that_uses_up_the_tokens(tmp_path: Path):
    recorder = make_recorder(tmp_path, steps=9, max_train_tokens=6)
    for step in recorder.steps():
        record(recorder, make_batch(step))
    assert (recorder.steps_done, recorder.tokens_trained) == (2, 10)


def test_what_black_boxes_cost_is_added_up_over_workers_and_left_out_where_there_is_none(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    record(recorder, make_batch(1))
    prices = Prices(usd_per_million_in=Decimal(1), usd_per_million_out=Decimal(2))
    for worker in range(2):
        meter = Meter(prices, Budget(usd=None, tokens=None), spent_file(tmp_path, "teacher", worker))
        meter.reserve(1000, 500).settle(1000, 500)
    record(recorder, make_batch(2))
    free, paid = lines(tmp_path)
    assert not {"teacher_tokens", "teacher_usd"} & free.keys()
    assert (paid["teacher_tokens"], paid["teacher_usd"]) == (3000, 0.004)


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
            "refused": 2,
            "weights_version": 3,
        }.items()
    )
    assert line["tokens_per_second"] == pytest.approx(25 / line["seconds_step"])


def test_an_age_that_nobody_has_is_left_out(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    next(iter(recorder.steps()))
    record(recorder, make_batch(1, make_receipt(0, version=-1)))
    assert not any(name.startswith("staleness") for name in lines(tmp_path)[0])


def test_a_step_says_how_repetitive_one_completion_in_ten_is(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    next(iter(recorder.steps()))
    ratios = [3.0, 2.0, 2.5, 3.0, math.nan, 2.0, 3.5, 2.0, 3.0, 2.0, 40.0]
    record(recorder, make_batch(1, *(make_receipt(n, repetition=ratio) for n, ratio in enumerate(ratios))))
    assert lines(tmp_path)[0]["repetition_p90"] == 3.5
    record(recorder, make_batch(2, *(make_receipt(n, repetition=ratio) for n, ratio in enumerate(ratios[-5:]))))
    assert lines(tmp_path)[1]["repetition_p90"] == 40.0


def test_a_repetition_that_nobody_measured_is_missing_not_zero(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    next(iter(recorder.steps()))
    record(recorder, make_batch(1))
    assert lines(tmp_path)[0]["repetition_p90"] is None


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


def test_the_ledger_says_which_prompts_each_step_trained(tmp_path: Path):
    recorder = make_recorder(tmp_path)
    for step in recorder.steps():
        record(
            recorder, make_batch(step, *(make_receipt(n, sample=k) for n in (2 * step + 1, 2 * step) for k in (0, 1)))
        )
    assert steps_in(tmp_path, "ledger.jsonl") == [
        {"step": step, "prompts": [f"train-{2 * step}", f"train-{2 * step + 1}"]} for step in (1, 2, 3)
    ]


def resumed(folder: Path, steps_done: int) -> Recorder:
    recorder = Recorder(journal=Journal(folder, resume=True), config=LoopConfig(steps=9))
    recorder.go_on(steps_done, steps_in(folder))
    return recorder


def first_attempt(folder: Path, steps: int) -> Recorder:
    recorder = make_recorder(folder, steps=steps)
    for step in recorder.steps():
        with recorder.waiting_for("train"):
            sum(range(10_000))
        record(recorder, make_batch(step), **({"reverse_kl": float(step)} if step != 2 else {}))
    recorder.journal.close()
    return recorder


def test_a_run_that_goes_on_counts_what_stays_done(tmp_path: Path):
    first_attempt(tmp_path, 5)
    recorder = resumed(tmp_path, 3)
    assert (recorder.steps_done, recorder.tokens_trained) == (3, 15)
    assert [recorder.reverse_kl[0], recorder.reverse_kl[2]] == [1.0, 3.0]
    assert math.isnan(recorder.reverse_kl[1])
    of_steps = steps_in(tmp_path)[:3]
    assert recorder.seconds == {"train": pytest.approx(sum(line["seconds_train"] for line in of_steps))}
    assert recorder.seconds_total >= of_steps[-1]["seconds_total"]
    assert next(iter(recorder.steps())) == 4


def test_steps_that_are_done_again_are_counted_once(tmp_path: Path):
    first_attempt(tmp_path, 5)
    recorder = resumed(tmp_path, 3)
    for step in recorder.steps():
        record(recorder, make_batch(step))
    done = steps_in(tmp_path)
    assert [(line["step"], line["tokens_trained"]) for line in done] == [(step, 5 * step) for step in range(1, 10)]
    assert [line["seq"] for line in lines(tmp_path)] == list(range(1, 12))
    assert all(earlier["seconds_total"] < later["seconds_total"] for earlier, later in itertools.pairwise(done))


def test_a_run_whose_last_records_are_lost_goes_on_where_its_checkpoint_is(tmp_path: Path):
    first_attempt(tmp_path, 2)
    recorder = resumed(tmp_path, 3)
    assert (recorder.steps_done, next(iter(recorder.steps()))) == (3, 4)


def test_a_run_that_begins_counts_from_nothing(tmp_path: Path):
    Journal(tmp_path).event("run.started", "one")
    recorder = resumed(tmp_path, 0)
    assert (recorder.steps_done, recorder.tokens_trained, recorder.reverse_kl) == (0, 0, [])
