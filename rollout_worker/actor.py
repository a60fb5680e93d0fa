"""The rollout worker as a Ray actor: opens engines, loads weights by version, hands out receipts.

Scored rollouts go into the object store here, one object per call; only their receipts travel to the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import ray

from potstill.config import RunConfig
from potstill.teachers.opening import Access
from potstill.types import Prompt, Receipt, ScoredRollout, ScoreStatus, WeightsVersion
from potstill.wire import Capabilities
from rollout_worker.collect import Collected, Verdicts
from rollout_worker.opening import Opened, open_worker

HIDDEN = "(learnt under the teacher's own prompt, which is not shown)"


class RolloutWorker:
    """Serves one run at a time; `open` starts another run in the same process."""

    def __init__(self) -> None:
        self._run: Opened | None = None

    async def open(
        self, config: RunConfig, accesses: Mapping[str, Access], met: Capabilities | None, number: int
    ) -> None:
        """Load what the run needs. `accesses` and `met`: where its teachers are met, and what who scores offers.

        `number` is this worker's among the run's.
        """
        await self.close()
        self._run = await open_worker(config, accesses, met, number)

    async def rollout(self, prompts: Sequence[Prompt]) -> list[list[Receipt]]:
        """Write, judge and score the prompts. Receipts by prompt, in order."""
        collected = await self._opened.collector.collect(prompts)
        bundle = ray.put(list(collected.scored))
        receipts: dict[str, list[Receipt]] = {prompt.id: [] for prompt in prompts}
        for position, scored in enumerate(collected.scored):
            receipts[scored.rollout.prompt_id].append(receipt_of(collected, position, bundle))
        return [receipts[prompt.id] for prompt in prompts]

    async def evaluate(self, prompts: Sequence[Prompt], who: Literal["student", "teacher"]) -> Verdicts:
        return await self._opened.collector.evaluate(prompts, who)

    async def load_weights(self, version: WeightsVersion) -> int:
        """Fetch, check and swap. Raises StaleWeights for an older version, WeightsError for a damaged one."""
        return await self._opened.load_weights(version, await version.payload)

    def describe(self, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        """The rollouts behind the receipts as text, token by token, for people to look at."""
        decode = self._opened.tokenizer.decode
        return [described(ray.get(receipt.bundle)[receipt.position], decode) for receipt in receipts]

    def completions(self, receipts: Sequence[Receipt]) -> list[list[int]]:
        """The token ids behind the receipts."""
        return [ray.get(r.bundle)[r.position].rollout.completion_ids.tolist() for r in receipts]

    def spent(self) -> dict[str, Any]:
        """What a paid teacher was asked here and what it cost; empty where nobody is paid."""
        return self._opened.spent()

    async def close(self) -> None:
        if self._run is not None:
            await self._run.close()
            self._run = None

    @property
    def _opened(self) -> Opened:
        if self._run is None:
            raise RuntimeError("open a run first")
        return self._run


def described(scored: ScoredRollout, decode: Callable[[list[int]], Any]) -> dict[str, Any]:
    """The rollout as text, token by token; its prompt is the student's, and the teacher's own is not shown."""
    rollout, scores = scored.rollout, scored.scores
    teacher = scores.sampled if scores is not None else np.full(len(rollout.completion_ids), math.nan)
    columns = zip(
        rollout.completion_ids.tolist(),
        rollout.student_logprobs.tolist(),
        teacher.tolist(),
        rollout.weight_versions.tolist(),
        rollout.loss_mask.tolist(),
        strict=True,
    )
    return {
        "prompt_id": rollout.prompt_id,
        "prompt": HIDDEN if rollout.privileged else decode(rollout.prompt_ids.tolist()),
        "reward": rollout.reward,
        "finish_reason": rollout.finish_reason.value,
        "tokens": [
            {
                "text": decode([token]),
                "id": token,
                "student_logprob": student,
                "teacher_logprob": teacher,
                "version": version,
                "trained": trained,
            }
            for token, student, teacher, version, trained in columns
        ],
    }


def receipt_of(collected: Collected, position: int, bundle: Any) -> Receipt:
    """What the loop sees of one rollout. Text of somebody who never changes is of no version, and never too old."""
    scored = collected.scored[position]
    rollout = scored.rollout
    return Receipt(
        rollout_id=rollout.id,
        prompt_id=rollout.prompt_id,
        index=rollout.index,
        domain=rollout.domain,
        oldest_version=-1 if rollout.snapshot else int(rollout.weight_versions.min()),
        num_prompt_tokens=len(rollout.prompt_ids),
        num_completion_tokens=len(rollout.completion_ids),
        num_loss_tokens=rollout.num_loss_tokens,
        num_unscored_tokens=_num_unscored(scored),
        finish_reason=rollout.finish_reason,
        reward=rollout.reward,
        generate_s=collected.generate_s / len(collected.scored),
        score_s=collected.score_s / len(collected.scored),
        bundle=bundle,
        position=position,
    )


def _num_unscored(scored: ScoredRollout) -> int:
    rollout, scores = scored.rollout, scored.scores
    if scores is None:
        return 0
    if scores.status != ScoreStatus.OK:
        return rollout.num_loss_tokens
    return int((rollout.loss_mask & ~np.isfinite(scores.sampled)).sum())
