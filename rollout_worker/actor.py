"""The rollout worker as a Ray actor: opens engines, loads weights by version, hands out receipts.

Scored rollouts go into the object store here, one object per call; only their receipts travel to the loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray

from potstill.config import LocalTeacher, RunConfig, ServerTeacher
from potstill.environments import open_environment
from potstill.errors import TokenizerMismatch
from potstill.teacher_client import TeacherClient
from potstill.tokenization import fingerprint, load_tokenizer
from potstill.types import Prompt, Receipt, ScoredRollout, ScoreStatus, TeacherIdentity, WeightsVersion
from rollout_worker.collect import Collected, Collector, Verdicts
from rollout_worker.engine import RolloutEngine, build_engine


class RolloutWorker:
    """Serves one run at a time; `open` starts another run in the same process."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._engines: list[RolloutEngine] = []
        self._teacher: TeacherClient | None = None

    async def open(
        self, config: RunConfig, max_model_len: int, teacher: tuple[str, str, TeacherIdentity] | None
    ) -> None:
        """Load what the run needs. `teacher` is url, key and identity of the server that scores, where one does."""
        await self.close()
        self._tokenizer = load_tokenizer(config.student.model)
        identity = None
        if teacher is not None and isinstance(config.teacher, ServerTeacher):
            url, key, identity = teacher
            self._require_same_tokens(identity.name, identity.tokenizer_fingerprint, config.student.model)
            self._teacher = TeacherClient(
                url, key=key, deadline_s=config.teacher.deadline_s, concurrency=config.teacher.concurrency
            )
        if isinstance(config.teacher, LocalTeacher):
            for one in config.teacher.models:
                self._require_same_tokens(one.model, fingerprint(load_tokenizer(one.model)), config.student.model)
        self._student = self._engine(config, config.student.model, max_model_len)
        writes = "teacher" in {config.rollout.source, config.rollout.beside}
        self._collector = Collector(
            config,
            student=self._student,
            teacher_engine=self._engine(config, _teachers_folder(config), max_model_len) if writes else None,
            tokenizer=self._tokenizer,
            environment=open_environment(config.data),
            teacher=self._teacher,
            identity=identity,
        )

    async def rollout(self, prompts: Sequence[Prompt]) -> list[list[Receipt]]:
        """Write, judge and score the prompts. Receipts by prompt, in order."""
        collected = await self._collector.collect(prompts)
        bundle = ray.put(list(collected.scored))
        receipts: dict[str, list[Receipt]] = {prompt.id: [] for prompt in prompts}
        for position, scored in enumerate(collected.scored):
            receipts[scored.rollout.prompt_id].append(_receipt(collected, position, bundle))
        return [receipts[prompt.id] for prompt in prompts]

    async def evaluate(self, prompts: Sequence[Prompt], who: Literal["student", "writer"]) -> Verdicts:
        return await self._collector.evaluate(prompts, who)

    async def load_weights(self, version: WeightsVersion) -> int:
        """Fetch, check and swap. Raises StaleWeights for an older version, WeightsError for a damaged one."""
        payload: np.ndarray = await version.payload
        await self._student.load_weights(version, payload)
        return self._student.version

    def describe(self, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        """The rollouts behind the receipts as text, token by token, for people to look at."""
        return [self._described(ray.get(receipt.bundle)[receipt.position]) for receipt in receipts]

    async def close(self) -> None:
        for engine in self._engines:
            await engine.close()
        self._engines.clear()
        if self._teacher is not None:
            await self._teacher.aclose()
            self._teacher = None

    def _require_same_tokens(self, teacher: str, found: str, student: str) -> None:
        if found != fingerprint(self._tokenizer):
            raise TokenizerMismatch(
                f"teacher {teacher!r} reads other tokens than student {student!r}: "
                "their tokenizers differ, so its scores would be of other text"
            )

    def _engine(self, config: RunConfig, model: str, max_model_len: int) -> RolloutEngine:
        engine = build_engine(
            config.rollout.engine,
            model=Path(model),
            dtype=config.student.dtype,
            stop_token_id=self._tokenizer.eos_token_id,
            version=0,
            threads=self._threads,
            max_model_len=max_model_len,
        )
        self._engines.append(engine)
        return engine

    def _described(self, scored: ScoredRollout) -> dict[str, Any]:
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
            "prompt": self._tokenizer.decode(rollout.prompt_ids.tolist()),
            "reward": rollout.reward,
            "finish_reason": rollout.finish_reason.value,
            "tokens": [
                {
                    "text": self._tokenizer.decode([token]),
                    "id": token,
                    "student_logprob": student,
                    "teacher_logprob": teacher,
                    "version": version,
                    "trained": trained,
                }
                for token, student, teacher, version, trained in columns
            ],
        }


def _teachers_folder(config: RunConfig) -> str:
    """The model that writes the teacher's text; the student's own weights where it teaches itself."""
    if isinstance(config.teacher, LocalTeacher):
        return config.teacher.models[0].model
    named = config.teacher.model if isinstance(config.teacher, ServerTeacher) else None
    return named or config.student.model


def _receipt(collected: Collected, position: int, bundle: Any) -> Receipt:
    scored = collected.scored[position]
    rollout = scored.rollout
    return Receipt(
        rollout_id=rollout.id,
        prompt_id=rollout.prompt_id,
        index=rollout.index,
        domain=rollout.domain,
        oldest_version=int(rollout.weight_versions.min()),
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
