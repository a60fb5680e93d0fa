"""What a run measures of itself: counts steps and tokens, times what is waited for, writes metrics.

Knows nothing of how a step is made. A number that was not measured is left out, never zero.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.calling.meter import spent_in
from potstill.config import LoopConfig
from potstill.journal import Journal
from potstill.spans import Spans
from potstill.types import FinishReason, StepBatch, StepReport

WAITS = {"generate": "wait:batch", "canaries": "wait:canaries", "train": "wait:train", "weights": "wait:publish"}
"""What the loop's spans call its stages."""


@dataclass(slots=True, kw_only=True)
class Recorder:
    """One run's counters. `seconds` sums each stage over the run."""

    journal: Journal
    config: LoopConfig
    tokens_trained: int = 0
    steps_done: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    spans: Spans = field(default_factory=lambda: Spans(None, "loop"))
    reverse_kl: list[float] = field(default_factory=list)
    latest: Mapping[str, float] = field(default_factory=dict)  # of the last step
    before: float = 0.0  # seconds of earlier attempts
    _started: float = field(default_factory=time.perf_counter)
    _step_started: float = field(default_factory=time.perf_counter)
    _step_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def go_on(self, steps_done: int, steps: Sequence[Mapping[str, Any]]) -> None:
        """Count what earlier attempts recorded (journal.steps_in) of the steps that stay done.

        A power cut may have taken the last of these records; the steps that they are of stay done.
        """
        self.steps_done = steps_done
        steps = [step for step in steps if step["step"] <= steps_done]
        for step in steps:
            self.reverse_kl.append(_number(step.get("reverse_kl")))
            for name, seconds in step.items():
                if name.startswith("seconds_") and name not in {"seconds_step", "seconds_total"}:
                    self.seconds[name.removeprefix("seconds_")] += _number(seconds)
        if steps:
            self.tokens_trained = steps[-1]["tokens_trained"]
            self.before = steps[-1]["seconds_total"]

    def steps(self) -> Iterator[int]:
        """The next step, and the next, until the run's steps are done or its tokens are used up."""
        limit = self.config.max_train_tokens
        for step in range(self.steps_done + 1, self.config.steps + 1):
            if limit is not None and self.tokens_trained >= limit:
                return
            self._step_started = time.perf_counter()
            self._step_seconds.clear()
            yield step

    @property
    def seconds_total(self) -> float:
        """Of this attempt, and of those before it up to where this one began."""
        return self.before + time.perf_counter() - self._started

    @contextmanager
    def waiting_for(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self.spans.span(WAITS[stage], step=self.steps_done + 1):
                yield
        finally:
            elapsed = time.perf_counter() - started
            self._step_seconds[stage] += elapsed
            self.seconds[stage] += elapsed

    def waiting_for_grant(self, worker: int) -> AbstractContextManager[None]:
        return self.spans.span("wait:grant", worker=worker)

    def step(self, batch: StepBatch, report: StepReport, *, num_waiting: int, num_refused: int) -> None:
        """Write the step's line of metrics.jsonl, and of ledger.jsonl: which prompts it trained."""
        now = time.perf_counter()
        self.tokens_trained += batch.num_loss_tokens
        self.steps_done = report.step
        seconds_step = now - self._step_started
        values = {
            **report.metrics,
            **_of_rollouts(batch),
            **{f"seconds_{stage}": seconds for stage, seconds in self._step_seconds.items()},
            "seconds_step": seconds_step,
            "seconds_total": self.seconds_total,
            "tokens_trained": self.tokens_trained,
            "tokens_per_second": batch.num_loss_tokens / seconds_step,
            "queue": num_waiting,
            "refused": num_refused,
            "weights_version": report.step,
            **_of_spending(self.journal.folder),
        }
        self.reverse_kl.append(values.get("reverse_kl", math.nan))
        self.latest = values
        self.journal.trained(report.step, sorted({receipt.prompt_id for receipt in batch.receipts}))
        self.journal.metrics(report.step, values)


def _number(value: Any) -> float:
    """As it was before JSON, which has null for what is missing."""
    return math.nan if value is None else float(value)


def _of_rollouts(batch: StepBatch) -> dict[str, float]:
    receipts = batch.receipts
    loss_tokens = sum(receipt.num_loss_tokens for receipt in receipts)
    lengths = [receipt.num_completion_tokens for receipt in receipts]
    staleness = [batch.step - 1 - r.oldest_version for r in receipts if r.oldest_version >= 0]
    found = {
        "accuracy": share_right([receipt.reward for receipt in receipts]),
        "completion_tokens": statistics.fmean(lengths),
        "truncated_fraction": statistics.fmean(r.finish_reason is FinishReason.LENGTH for r in receipts),
        "worker_seconds_generate": sum(receipt.generate_s for receipt in receipts),
        "worker_seconds_score": sum(receipt.score_s for receipt in receipts),
        "repetition_p90": _ninetieth([receipt.repetition for receipt in receipts]),
        "unscored_fraction": sum(receipt.num_unscored_tokens for receipt in receipts) / loss_tokens,
    }
    if staleness:
        found |= {"staleness_mean": statistics.fmean(staleness), "staleness_max": float(max(staleness))}
    return found


def _of_spending(folder: Path) -> dict[str, float]:
    spent = spent_in(folder)
    return {} if spent is None else {"teacher_tokens": float(spent[0]), "teacher_usd": spent[1]}


def _ninetieth(values: Sequence[float]) -> float:
    """Percentile, by nearest rank, of what was measured; NaN of nothing.

    >>> _ninetieth([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, math.nan])
    9.0
    """
    known = sorted(value for value in values if not math.isnan(value))
    return known[math.ceil(0.9 * len(known)) - 1] if known else math.nan


def share_right(rewards: Sequence[float]) -> float:
    """Of full marks: partial credit is a reward, not a right answer. NaN where anything could not be judged."""
    return math.nan if any(math.isnan(reward) for reward in rewards) else statistics.fmean(r >= 1 for r in rewards)
