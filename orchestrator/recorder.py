"""What a run measures of itself: counts steps and tokens, times what is waited for, writes metrics.

Knows nothing of how a step is made. A number that was not measured is left out, never zero.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from potstill.config import LoopConfig
from potstill.journal import Journal
from potstill.types import FinishReason, StepBatch, StepReport


@dataclass(slots=True, kw_only=True)
class Recorder:
    """One run's counters. `seconds` sums each stage over the run."""

    journal: Journal
    config: LoopConfig
    tokens_trained: int = 0
    steps_done: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    reverse_kl: list[float] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)
    _step_started: float = field(default_factory=time.perf_counter)
    _step_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def steps(self) -> Iterator[int]:
        """1, 2, … until the run's steps are done or its tokens are used up."""
        limit = self.config.max_train_tokens
        for step in range(1, self.config.steps + 1):
            if limit is not None and self.tokens_trained >= limit:
                return
            self._step_started = time.perf_counter()
            self._step_seconds.clear()
            yield step

    @contextmanager
    def waiting_for(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self._step_seconds[stage] += elapsed
            self.seconds[stage] += elapsed

    def step(self, batch: StepBatch, report: StepReport, *, num_waiting: int) -> None:
        """Write the step's line of metrics.jsonl."""
        now = time.perf_counter()
        self.tokens_trained += batch.num_loss_tokens
        self.steps_done = report.step
        seconds_step = now - self._step_started
        values = {
            **report.metrics,
            **_of_rollouts(batch),
            **{f"seconds_{stage}": seconds for stage, seconds in self._step_seconds.items()},
            "seconds_step": seconds_step,
            "seconds_total": now - self._started,
            "tokens_trained": self.tokens_trained,
            "tokens_per_second": batch.num_loss_tokens / seconds_step,
            "queue": num_waiting,
            "weights_version": report.step,
        }
        self.reverse_kl.append(values.get("reverse_kl", math.nan))
        self.journal.metrics(report.step, values)


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
        "unscored_fraction": sum(receipt.num_unscored_tokens for receipt in receipts) / loss_tokens,
    }
    if staleness:
        found |= {"staleness_mean": statistics.fmean(staleness), "staleness_max": float(max(staleness))}
    return found


def share_right(rewards: Sequence[float]) -> float:
    """Of full marks: partial credit is a reward, not a right answer. NaN where anything could not be judged."""
    return math.nan if any(math.isnan(reward) for reward in rewards) else statistics.fmean(r >= 1 for r in rewards)
