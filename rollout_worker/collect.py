"""Prompts in, scored rollouts out: render, write, judge, score.

Decides nothing about when or how many. Knows no Ray: engines, tokenizer, environment and teacher are handed in.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from potstill.config import RunConfig, SamplingConfig
from potstill.environments import Environment
from potstill.errors import ConfigError
from potstill.methods import Tier
from potstill.privilege import privileged_messages
from potstill.teacher_client import TeacherClient
from potstill.tokenization import render
from potstill.types import (
    FinishReason,
    IntArray,
    Prompt,
    Rollout,
    ScoredRollout,
    TeacherIdentity,
    TeacherScores,
)
from potstill.wire import ScoreItem, Want
from rollout_worker.engine import Completion, GenerationRequest, RolloutEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_THE_STUDENT = -1  # the weights version of a token that the student did not write

WANTED: dict[Tier, frozenset[Want]] = {
    Tier.SAMPLED: frozenset({"sampled"}),
    Tier.TOPK: frozenset({"sampled", "topk"}),
    Tier.IDS: frozenset({"sampled", "token_ids"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Scored rollouts in the order of their prompts, and where the time went."""

    scored: tuple[ScoredRollout, ...]
    generate_s: float
    score_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Of held-out prompts."""

    rewards: tuple[float, ...]
    num_tokens: int
    num_truncated: int


class Collector:
    """One rollout worker's work. `student` is evaluated; `writer` writes (None: the data's own solutions are used)."""

    def __init__(
        self,
        config: RunConfig,
        *,
        student: RolloutEngine,
        writer: RolloutEngine | None,
        tokenizer: PreTrainedTokenizerBase,
        environment: Environment,
        teacher: TeacherClient | None,
        identity: TeacherIdentity | None,
    ) -> None:
        self._config = config
        self._student = student
        self._writer = writer
        self._tokenizer = tokenizer
        self._environment = environment
        self._teacher = teacher
        self._identity = identity

    async def collect(self, prompts: Sequence[Prompt]) -> Collected:
        """All completions of the prompts, judged and scored. Raises TeacherError and what engines raise."""
        started = time.perf_counter()
        if self._writer is None:
            rollouts = [self._rollout(prompt, 0, self._reference(prompt)) for prompt in prompts]
        else:
            rollouts = await self._written(self._writer, prompts)
        written = time.perf_counter()
        scores = [None] * len(rollouts) if self._teacher is None else await self._scores(self._teacher, rollouts)
        return Collected(
            scored=tuple(ScoredRollout(rollout=r, scores=s) for r, s in zip(rollouts, scores, strict=True)),
            generate_s=written - started,
            score_s=time.perf_counter() - written,
        )

    async def evaluate(self, prompts: Sequence[Prompt], who: Literal["student", "writer"]) -> Verdicts:
        """Answers to held-out prompts, judged; a writer that is the teacher reads its own, privileged prompt."""
        engine = self._student if who == "student" else self._writer
        if engine is None:
            raise ConfigError("nobody writes in this run: its completions are the data's own")
        sampling = SamplingConfig(
            max_new_tokens=self._config.rollout.sampling.max_new_tokens, temperature=self._config.eval.temperature
        )
        requests = [self._request(prompt, 0, privileged=who == "writer") for prompt in prompts]
        completions = await engine.generate(requests, sampling, want_logprobs=False, support_k=0)
        return Verdicts(
            rewards=tuple(self._judge(p, c) for p, c in zip(prompts, completions, strict=True)),
            num_tokens=sum(len(c.token_ids) for c in completions),
            num_truncated=sum(c.finish_reason is FinishReason.LENGTH for c in completions),
        )

    async def _written(self, engine: RolloutEngine, prompts: Sequence[Prompt]) -> list[Rollout]:
        config, objective = self._config.rollout, self._config.objective
        jobs = [(prompt, sample) for prompt in prompts for sample in range(config.samples_per_prompt)]
        completions = await engine.generate(
            [self._request(prompt, sample, privileged=not self._on_policy) for prompt, sample in jobs],
            config.sampling,
            want_logprobs=self._on_policy,
            support_k=objective.k if objective.k and objective.support == "student_topk" else 0,
        )
        return [self._rollout(p, sample, c) for (p, sample), c in zip(jobs, completions, strict=True)]

    def _request(self, prompt: Prompt, sample: int, *, privileged: bool) -> GenerationRequest:
        context = self._privileged_ids(prompt) if privileged else None
        return GenerationRequest(
            id=f"{prompt.id}/{sample}",
            prompt_ids=self._prompt_ids(prompt) if context is None else context,
            seed=_seed(self._config.seed, prompt.id, sample),
        )

    def _rollout(self, prompt: Prompt, sample: int, completion: Completion) -> Rollout:
        length = len(completion.token_ids)
        others = np.full(length, NOT_THE_STUDENT, dtype=np.int32)
        return Rollout(
            id=f"{prompt.id}/{sample}",
            prompt_id=prompt.id,
            index=prompt.index * self._config.rollout.samples_per_prompt + sample,
            domain=prompt.domain,
            prompt_ids=self._learnt_under(prompt),
            completion_ids=completion.token_ids,
            loss_mask=np.ones(length, dtype=np.bool_),
            student_logprobs=completion.logprobs,
            weight_versions=completion.weight_versions if self._on_policy else others,
            finish_reason=completion.finish_reason,
            temperature=self._config.rollout.sampling.temperature,
            reward=self._judge(prompt, completion),
            teacher_context_ids=self._privileged_ids(prompt),
            support_ids=completion.support_ids,
            support_logprobs=completion.support_logprobs,
        )

    def _reference(self, prompt: Prompt) -> Completion:
        """The data's own solution, as if it had been written. Raises ConfigError when the prompt has none."""
        if prompt.solution is None:
            raise ConfigError(f'rollout.source = "reference": prompt {prompt.id} has no solution to learn from')
        ids = [*self._tokenizer.encode(prompt.solution, add_special_tokens=False), self._tokenizer.eos_token_id]
        return Completion(
            token_ids=np.array(ids, dtype=np.int32),
            logprobs=np.full(len(ids), math.nan, dtype=np.float32),
            support_ids=None,
            support_logprobs=None,
            weight_versions=np.full(len(ids), NOT_THE_STUDENT, dtype=np.int32),
            finish_reason=FinishReason.STOP,
        )

    async def _scores(self, teacher: TeacherClient, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        objective = self._config.objective
        items = [
            ScoreItem(
                id=rollout.id,
                context_ids=rollout.prompt_ids,
                completion_ids=rollout.completion_ids,
                teacher_context_ids=rollout.teacher_context_ids,
                token_ids=rollout.support_ids,
            )
            for rollout in rollouts
        ]
        top_k = objective.k if objective.k and objective.support == "teacher_topk" else 0
        return await teacher.score(items, WANTED[objective.tier], top_k, expect=self._identity)

    def _prompt_ids(self, prompt: Prompt) -> IntArray:
        return np.array(render(self._tokenizer, prompt.messages), dtype=np.int32)

    def _learnt_under(self, prompt: Prompt) -> IntArray:
        """The prompt that the completion is trained under: the student's, or for a share of references the hint."""
        share = self._config.rollout.privileged_share
        if self._writer is None and _fraction(prompt.id) < share:
            privileged = self._privileged_ids(prompt)
            assert privileged is not None, "checked by the plan"
            return privileged
        return self._prompt_ids(prompt)

    def _privileged_ids(self, prompt: Prompt) -> IntArray | None:
        """What the teacher reads instead of the student's prompt; None: it reads the same."""
        template = getattr(self._config.teacher, "privileged_template", None)
        if template is None:
            return None
        return np.array(render(self._tokenizer, privileged_messages(prompt, template)), dtype=np.int32)

    def _judge(self, prompt: Prompt, completion: Completion) -> float:
        text = self._tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        return self._environment.score(prompt, text)

    @property
    def _on_policy(self) -> bool:
        return self._config.rollout.source == "student"


def _seed(run_seed: int, prompt_id: str, sample: int) -> int:
    """63 bits that depend on the run, the prompt and the sample, and on nothing else."""
    return _digest(f"{run_seed}/{prompt_id}/{sample}") >> 1


def _fraction(prompt_id: str) -> float:
    """Of [0, 1), the same for a prompt for ever."""
    return _digest(prompt_id) / 2**64


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
