"""Prompts in, scored rollouts out: render, write, judge, score.

Decides nothing about when or how many. Knows no Ray: engines, tokenizer, environment and teacher are handed in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from potstill.algebra.gates import Confidence, EntropyGap, TeacherEntropyAbove
from potstill.algebra.objective import Objective, Term
from potstill.algebra.supports import StudentTopK, TeacherTopK
from potstill.config import RunConfig, SamplingConfig
from potstill.environments import Environment
from potstill.errors import ConfigError
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
    """One rollout worker's work. `student` writes and is evaluated; `teacher_engine` writes where a run wants it."""

    def __init__(
        self,
        config: RunConfig,
        *,
        student: RolloutEngine,
        teacher_engine: RolloutEngine | None,
        tokenizer: PreTrainedTokenizerBase,
        environment: Environment,
        teacher: TeacherClient | None,
        identity: TeacherIdentity | None,
    ) -> None:
        self._config = config
        self._student = student
        self._teacher_engine = teacher_engine
        self._tokenizer = tokenizer
        self._environment = environment
        self._teacher = teacher
        self._identity = identity

    async def collect(self, prompts: Sequence[Prompt]) -> Collected:
        """All completions of the prompts, judged and scored. Raises TeacherError and what engines raise."""
        started = time.perf_counter()
        rollouts: list[Rollout] = []
        for source, some in self._sources(prompts):
            rollouts += await self._texts(source, some)
        written = time.perf_counter()
        scores = await self._scores(rollouts)
        return Collected(
            scored=tuple(ScoredRollout(rollout=r, scores=s) for r, s in zip(rollouts, scores, strict=True)),
            generate_s=written - started,
            score_s=time.perf_counter() - written,
        )

    async def evaluate(self, prompts: Sequence[Prompt], who: Literal["student", "writer"]) -> Verdicts:
        """Answers to held-out prompts, judged; a writer that is the teacher reads its own, privileged prompt."""
        engine = self._student if who == "student" else self._teacher_engine
        if engine is None:
            raise ConfigError("no teacher writes in this run")
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

    def _sources(self, prompts: Sequence[Prompt]) -> list[tuple[str, Sequence[Prompt]]]:
        """Who answers which of the prompts: always the same for a prompt, whatever it comes with."""
        config = self._config.rollout
        if config.beside == "none":
            return [(config.source, prompts)]
        beside = [prompt for prompt in prompts if _fraction(prompt.id) < config.beside_share]
        given = {prompt.id for prompt in beside} if config.beside_instead else set()
        return [(config.source, [p for p in prompts if p.id not in given]), (config.beside, beside)]

    async def _texts(self, source: str, prompts: Sequence[Prompt]) -> list[Rollout]:
        """What `source` answers. A view "privileged" gives every completion twice: learnt under both prompts."""
        if source == "reference":
            return [self._rollout(prompt, 0, self._reference(prompt), by=source) for prompt in prompts]
        own, config = source == "student", self._config.rollout
        engine = self._student if own else self._teacher_engine
        assert engine is not None, "opened for every source of the config"
        jobs = [(prompt, sample) for prompt in prompts for sample in range(config.samples_per_prompt if own else 1)]
        privileged = not own or config.view == "privileged"
        completions = await engine.generate(
            [self._request(prompt, sample, privileged=privileged) for prompt, sample in jobs],
            config.sampling,
            want_logprobs=own,
            support_k=_support_k(self._config.objective) if own else 0,
        )
        rollouts = []
        for (prompt, sample), completion in zip(jobs, completions, strict=True):
            rollouts.append(self._rollout(prompt, sample, completion, by=source))
            if own and privileged:
                rollouts.append(_under_both(rollouts[-1]))
        return rollouts

    def _request(self, prompt: Prompt, sample: int, *, privileged: bool) -> GenerationRequest:
        context = self._privileged_ids(prompt) if privileged else None
        return GenerationRequest(
            id=f"{prompt.id}/{sample}",
            prompt_ids=self._prompt_ids(prompt) if context is None else context,
            seed=_seed(self._config.seed, prompt.id, sample),
        )

    def _rollout(self, prompt: Prompt, sample: int, completion: Completion, *, by: str) -> Rollout:
        length = len(completion.token_ids)
        others = np.full(length, NOT_THE_STUDENT, dtype=np.int32)
        return Rollout(
            id=f"{prompt.id}/{sample}" if by == self._config.rollout.source else f"{prompt.id}/{by}",
            prompt_id=prompt.id,
            index=prompt.index * self._config.rollout.samples_per_prompt + sample,
            domain=prompt.domain,
            prompt_ids=self._learnt_under(prompt, by),
            completion_ids=completion.token_ids,
            loss_mask=np.full(length, self._learnt(by), dtype=np.bool_),
            student_logprobs=completion.logprobs,
            weight_versions=completion.weight_versions if by == "student" else others,
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

    async def _scores(self, rollouts: Sequence[Rollout]) -> list[TeacherScores | None]:
        """The teacher's scores of the rollouts for which a term of the objective reads them."""
        objective = self._config.objective
        scored = [rollout for rollout in rollouts if objective.scored(rollout.origin)]
        if self._teacher is None or not scored:
            return [None] * len(rollouts)
        items = [
            ScoreItem(
                id=rollout.id,
                context_ids=rollout.prompt_ids,
                completion_ids=rollout.completion_ids,
                teacher_context_ids=rollout.teacher_context_ids,
                token_ids=rollout.support_ids,
            )
            for rollout in scored
        ]
        want, top_k = _wanted(objective)
        answers = await self._teacher.score(items, want, top_k, expect=self._identity)
        found = dict(zip((rollout.id for rollout in scored), answers, strict=True))
        return [found.get(rollout.id) for rollout in rollouts]

    def _prompt_ids(self, prompt: Prompt) -> IntArray:
        return np.array(render(self._tokenizer, prompt.messages), dtype=np.int32)

    def _learnt(self, by: str) -> bool:
        """Whether a term is for text of this source; a student's that none is for may still be judged."""
        origin = "student" if by == "student" else "others"
        return any(term.over in {"all", origin} for term in self._config.objective.terms.values())

    def _learnt_under(self, prompt: Prompt, by: str) -> IntArray:
        """The prompt that the completion is trained under: the student's, or for a share of references the hint."""
        if by == "reference" and _fraction(prompt.id) < self._config.rollout.privileged_share:
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


def _under_both(rollout: Rollout) -> Rollout:
    """The same completion once more, to be learnt under the teacher's own prompt."""
    assert rollout.teacher_context_ids is not None, "checked by the plan"
    return dataclasses.replace(
        rollout, id=f"{rollout.id}/privileged", prompt_ids=rollout.teacher_context_ids, privileged=True
    )


def _support_k(objective: Objective) -> int:
    """Entries of the student's own top-k that are kept while it writes, for a teacher to score."""
    return max((term.support.k for term in _scoring(objective) if isinstance(term.support, StudentTopK)), default=0)


def _wanted(objective: Objective) -> tuple[frozenset[Want], int]:
    """What the terms read of a teacher, and the entries of its own top-k."""
    terms = _scoring(objective)
    gates = [gate for term in terms for gate in term.gates]
    own = [term.support.k for term in terms if isinstance(term.support, TeacherTopK)]
    own += [1 for gate in gates if isinstance(gate, Confidence)]
    want: set[Want] = {"sampled"}
    want |= {"topk"} if own else set()
    want |= {"token_ids"} if _support_k(objective) else set()
    want |= {"entropy"} if any(isinstance(gate, EntropyGap | TeacherEntropyAbove) for gate in gates) else set()
    return frozenset(want), max(own, default=0)


def _scoring(objective: Objective) -> list[Term]:
    return [term for term in objective.terms.values() if term.reads_scores]


def _seed(run_seed: int, prompt_id: str, sample: int) -> int:
    """63 bits that depend on the run, the prompt and the sample, and on nothing else."""
    return _digest(f"{run_seed}/{prompt_id}/{sample}") >> 1


def _fraction(prompt_id: str) -> float:
    """Of [0, 1), the same for a prompt for ever."""
    return _digest(prompt_id) / 2**64


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
