"""The rollout worker as a Ray actor: opens engines, loads weights by version, hands out receipts.

Scored rollouts go into the object store here, one object per call; only their receipts travel to the loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import ray

from potstill import bundles, spool
from potstill.config import RunConfig
from potstill.durable import take_away
from potstill.errors import ChunkLost, Fenced, TeacherUnavailable
from potstill.fencing import Fence
from potstill.process_log import log_of, write_to
from potstill.spans import FOLDER, Spans
from potstill.teachers.opening import Access
from potstill.transports import Kept
from potstill.types import BoolArray, Bundle, Prompt, Receipt, ScoredRollout, ScoreStatus, WeightsVersion
from potstill.wire import Capabilities
from rollout_worker.collect import Collected, Verdicts, Written
from rollout_worker.opening import Opened, open_worker
from rollout_worker.repetition import repetition

aside = ray.method(concurrency_group="aside")  # answered while a model is being loaded

HIDDEN = "(learnt under the teacher's own prompt, which is not shown)"


class RolloutWorker:
    """Serves one run at a time; `open` starts another run, or another attempt of it, in the same process."""

    def __init__(self) -> None:
        self._run: Opened | None = None
        self._written: dict[range, Written] = {}  # not scored: the teacher was away
        self._spooling: asyncio.Task[None] | None = None
        self._spooling_in_turn = asyncio.Lock()
        self._kept: Kept = {}

    async def open(
        self, config: RunConfig, accesses: Mapping[str, Access], met: Capabilities | None, number: int, fence: Fence
    ) -> None:
        """Load what the run needs. `accesses` and `met`: where its teachers are met, and what who scores offers.

        `number` is this worker's among the run's; `fence` is of the attempt that it works for.
        """
        await self.close()
        self._kept = {}
        self._fence, self._spool = fence, fence.folder / "rollouts"
        self._spans = Spans(fence.folder / FOLDER / f"worker-{number}.jsonl", f"worker-{number}")
        write_to(log_of(fence.folder, f"rollout-{number}"))
        self._run = await open_worker(config, accesses, met, number)

    async def rollout(self, chunk: range, prompts: Sequence[Prompt], oldest: int) -> list[list[Receipt]]:
        """Write, judge and score a chunk of the run's prompts. Receipts by prompt, in order.

        To ask twice costs nothing twice: what version `oldest` or a later one has written and scored is handed out
        again, and what is only written is scored.
        """
        held = await asyncio.to_thread(self._held, chunk, oldest)
        if held is not None:
            return held
        fence = self._fence
        collected = await self._collected(chunk, prompts, oldest)
        if fence is not self._fence:
            raise Fenced(f"{fence.folder}: this worker was opened anew while it wrote prompt {chunk.start}")
        bundle = Bundle(ref=ray.put(list(collected.scored)), path=str(spool.path_of(self._spool, chunk)))
        groups = self._groups(collected, prompts, bundle)
        await self._spool_one_by_one(collected.scored, dict(zip(chunk, groups, strict=True)))
        return groups

    async def given(self, prompts: Sequence[Prompt]) -> list[Receipt]:
        """Rollouts that are not of the run's stream, as those of held-out prompts."""
        collected = await self._opened.collector.collect(prompts)
        bundle = Bundle(ref=ray.put(list(collected.scored)), path=None)
        return [receipt for group in self._groups(collected, prompts, bundle) for receipt in group]

    async def evaluate(self, prompts: Sequence[Prompt], who: Literal["student", "teacher"]) -> Verdicts:
        return await self._opened.collector.evaluate(prompts, who)

    async def load_weights(self, version: WeightsVersion) -> int:
        """Fetch, check and swap. Raises StaleWeights for an older version, WeightsError for a damaged one."""
        with self._spans.span("weights:load", version=version.version):
            payload = await asyncio.to_thread(version.payload.open, self._kept)
            return await self._opened.load_weights(version, payload)

    def describe(self, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        """The rollouts behind the receipts as text, token by token, for people to look at."""
        decode = self._opened.tokenizer.decode
        return [described(scored, decode) for scored in bundles.rollouts(receipts)]

    def completions(self, receipts: Sequence[Receipt]) -> list[list[int]]:
        """The token ids behind the receipts."""
        return [scored.rollout.completion_ids.tolist() for scored in bundles.rollouts(receipts)]

    def spent(self) -> dict[str, Any]:
        """What a paid teacher was asked here and what it cost; empty where nobody is paid."""
        return self._opened.spent()

    @aside  # type: ignore[untyped-decorator]
    async def beat(self) -> None:
        """A sign of life."""

    async def close(self) -> None:
        self._written.clear()
        if self._spooling is not None:
            await asyncio.wait([self._spooling])  # what becomes of it is of no interest to the next attempt
            self._spooling = None
        if self._run is not None:
            await self._run.close()
            self._run = None

    async def _collected(self, chunk: range, prompts: Sequence[Prompt], oldest: int) -> Collected:
        collector = self._opened.collector
        written = self._written.pop(chunk, None)
        if written is None or written.oldest_version < oldest:
            with self._spans.span("generate", chunk=chunk.start):
                written = await collector.write(prompts)
        try:
            with self._spans.span("score", chunk=chunk.start):
                return await collector.score(written)
        except TeacherUnavailable:
            self._written[chunk] = written
            raise

    def _held(self, chunk: range, oldest: int) -> list[list[Receipt]] | None:
        """The chunk's receipts, where the spool has it and it is not too old; one that is gives way."""
        path = spool.path_of(self._spool, chunk)
        if not path.exists():
            return None
        try:
            groups = [spool.receipts(path)[prompt] for prompt in chunk]
        except ChunkLost:
            return None
        if all(r.oldest_version < 0 or r.oldest_version >= oldest for group in groups for r in group):
            return groups
        take_away(path)
        return None

    async def _spool_one_by_one(self, scored: Sequence[ScoredRollout], groups: spool.Groups) -> None:
        """Write a chunk while the next one is being written; raises what became of the one before."""
        async with self._spooling_in_turn:
            if self._spooling is not None:
                await asyncio.shield(self._spooling)  # this call may be cancelled, the writing not
            self._spooling = asyncio.create_task(asyncio.to_thread(self._write_down, scored, groups))

    def _write_down(self, scored: Sequence[ScoredRollout], groups: spool.Groups) -> None:
        with self._spans.span("spool", chunk=min(groups)):
            spool.write(self._spool, scored, groups, self._fence)

    def _groups(self, collected: Collected, prompts: Sequence[Prompt], bundle: Bundle) -> list[list[Receipt]]:
        """Receipts by prompt, in the prompts' order."""
        receipts: dict[str, list[Receipt]] = {prompt.id: [] for prompt in prompts}
        for position, scored in enumerate(collected.scored):
            text = self._opened.tokenizer.decode(scored.rollout.completion_ids.tolist())
            receipt = receipt_of(collected, position, bundle, repetition=repetition(text))
            receipts[scored.rollout.prompt_id].append(receipt)
        return [receipts[prompt.id] for prompt in prompts]

    @property
    def _opened(self) -> Opened:
        if self._run is None:
            raise RuntimeError("open a run first")
        return self._run


def described(scored: ScoredRollout, decode: Callable[[list[int]], Any]) -> dict[str, Any]:
    """The rollout as text, token by token; its prompt is the student's, and the teacher's own is not shown."""
    rollout, scores = scored.rollout, scored.scores
    absent = np.full(len(rollout.completion_ids), math.nan)
    columns = {
        "id": rollout.completion_ids,
        "student_logprob": rollout.student_logprobs,
        "teacher_logprob": absent if scores is None else scores.sampled,
        "version": rollout.weight_versions,
        "trained": rollout.loss_mask,
    }
    if scores is not None and scores.chunks is not None:
        columns["chunk"] = scores.chunks
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {
        "rollout_id": rollout.id,
        "prompt_id": rollout.prompt_id,
        "domain": rollout.domain,
        "origin": rollout.origin,
        "prompt": HIDDEN if rollout.privileged else decode(rollout.prompt_ids.tolist()),
        "teacher_reads": "prompt" if rollout.teacher_context_ids is None else "privileged",
        "temperature": rollout.temperature,
        "reward": rollout.reward,
        "finish_reason": rollout.finish_reason.value,
        "tokens": [{"text": decode([row[0]]), **dict(zip(columns, row, strict=True))} for row in rows],
    }


def receipt_of(collected: Collected, position: int, bundle: Bundle, *, repetition: float) -> Receipt:
    """What the loop sees of one rollout. Text of somebody who never changes is of no version, and never too old."""
    scored = collected.scored[position]
    rollout = scored.rollout
    num_loss_tokens, num_unscored_tokens = _counts(scored, np.ones_like(rollout.loss_mask))
    ages = rollout.weight_versions[(rollout.weight_versions >= 0) & (not rollout.snapshot)]
    return Receipt(
        rollout_id=rollout.id,
        prompt_id=rollout.prompt_id,
        index=rollout.index,
        domain=rollout.domain,
        oldest_version=int(ages.min()) if len(ages) else -1,
        num_prompt_tokens=len(rollout.prompt_ids),
        num_completion_tokens=len(rollout.completion_ids),
        num_loss_tokens=num_loss_tokens,
        num_unscored_tokens=num_unscored_tokens,
        finish_reason=rollout.finish_reason,
        reward=rollout.reward,
        generate_s=collected.generate_s / len(collected.scored),
        score_s=collected.score_s / len(collected.scored),
        repetition=repetition,
        bundle=bundle,
        position=position,
        by_version=_by_version(scored) if len(ages) else (),
    )


def _by_version(scored: ScoredRollout) -> tuple[tuple[int, int, int], ...]:
    """Loss tokens, and unscored ones among them, by the version that wrote them; () where one wrote all."""
    versions = np.unique(scored.rollout.weight_versions)
    if len(versions) == 1:
        return ()
    return tuple(
        (int(version), *_counts(scored, scored.rollout.weight_versions == version)) for version in versions.tolist()
    )


def _counts(scored: ScoredRollout, where: BoolArray) -> tuple[int, int]:
    """Loss tokens among those of `where` [T], and those of them without a score."""
    learnt, scores = scored.rollout.loss_mask & where, scored.scores
    if scores is None:
        return int(learnt.sum()), 0
    missing = learnt if scores.status != ScoreStatus.OK else learnt & ~np.isfinite(scores.sampled)
    return int(learnt.sum()), int(missing.sum())
