"""Prompts in, scored rollouts out: advise, write, judge, score.

Decides which source answers which prompt, and nothing about when or how many. Knows no Ray and no network: sources,
judge and teacher are handed in.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from potstill.byte_alignment import ByteVocabulary
from potstill.config import RunConfig, SamplingConfig
from potstill.errors import ConfigError
from potstill.types import FinishReason, FloatArray, IntArray, Prompt, Rollout, ScoredRollout
from rollout_worker.judges import Judges
from rollout_worker.privacy import privacy
from rollout_worker.scoring import Scoring
from rollout_worker.sources import Engine, Source, Text, fraction
from rollout_worker.views import Views


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Rollouts that nobody has scored, with the prompts as their teachers read them."""

    rollouts: tuple[Rollout, ...]
    prompts: tuple[Prompt, ...]
    generate_s: float

    @property
    def oldest_version(self) -> int:
        """Of all tokens that the student's moving weights wrote; the largest there is where they wrote none."""
        moving = [rollout.weight_versions for rollout in self.rollouts if not rollout.snapshot]
        versions = [some[some >= 0] for some in moving]
        return min((int(found.min()) for found in versions if len(found)), default=sys.maxsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Scored rollouts, those of one source side by side and in the order of their prompts; where the time went."""

    scored: tuple[ScoredRollout, ...]
    generate_s: float
    score_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Of held-out prompts."""

    rewards: tuple[float, ...]
    num_tokens: int
    num_truncated: int


class Advisor(Protocol):
    async def advised(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with what a privileged teacher is told about them."""


class Collector:
    """One rollout worker's work.

    sources    by their names in [rollout]: "student", "snapshot", "teacher", "reference", "handoff", "revision"
    vocabulary what the student's ids write, where the objective reads how private tokens are
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        views: Views,
        sources: Mapping[str, Source],
        judges: Judges,
        advisor: Advisor | None,
        scoring: Scoring | None,
        vocabulary: ByteVocabulary | None,
    ) -> None:
        self._config = config
        self._views = views
        self._sources = sources
        self._judges = judges
        self._advisor = advisor
        self._scoring = scoring
        self._vocabulary = vocabulary

    async def collect(self, prompts: Sequence[Prompt]) -> Collected:
        """All completions of the prompts, judged and scored."""
        return await self.score(await self.write(prompts))

    async def write(self, prompts: Sequence[Prompt]) -> Written:
        """All completions of the prompts, judged. Raises what engines and black boxes raise."""
        started = time.perf_counter()
        if self._advisor is not None:
            prompts = await self._advisor.advised(prompts)
        by: list[str] = []
        texts: list[Text] = []
        for source, some in self._casting(prompts):
            written = await self._sources[source].write(some)
            by += [source] * len(written)
            texts += written
        rewards = await self._judges.training.rewards(texts)
        rollouts: list[Rollout] = []
        for text, source, reward in zip(texts, by, rewards, strict=True):
            rollouts += self._rollouts(text, source, reward)
        return Written(rollouts=tuple(rollouts), prompts=tuple(prompts), generate_s=time.perf_counter() - started)

    async def score(self, written: Written) -> Collected:
        """With the teacher's scores. Raises TeacherError; what is written can be scored again."""
        started = time.perf_counter()
        scored = await self._scored(written.rollouts, written.prompts)
        return Collected(scored=tuple(scored), generate_s=written.generate_s, score_s=time.perf_counter() - started)

    async def evaluate(self, prompts: Sequence[Prompt], who: Literal["student", "teacher"]) -> Verdicts:
        """One answer to each held-out prompt, judged; a teacher reads its own, privileged prompt, with its advice."""
        source = self._sources.get(who)
        if not isinstance(source, Engine):
            raise ConfigError(f"no {who} writes in this run with an engine")
        sampling = SamplingConfig(
            max_new_tokens=self._config.rollout.sampling.max_new_tokens, temperature=self._config.eval.temperature
        )
        asked = dataclasses.replace(source, sampling=sampling, samples=1, support_k=0, is_student=False)
        if who == "student":
            asked = dataclasses.replace(asked, view=self._views.own)
        elif self._advisor is not None:
            prompts = await self._advisor.advised(prompts)
        texts = await asked.write(prompts)
        return Verdicts(
            rewards=tuple(await self._judges.held_out.rewards(texts)),
            num_tokens=sum(len(text.completion.token_ids) for text in texts),
            num_truncated=sum(text.completion.finish_reason is FinishReason.LENGTH for text in texts),
        )

    def _casting(self, prompts: Sequence[Prompt]) -> list[tuple[str, Sequence[Prompt]]]:
        """Who answers which of the prompts: always the same for a prompt, whatever it comes with."""
        config = self._config.rollout
        standing = [prompt for prompt in prompts if prompt.text is not None]
        free = [prompt for prompt in prompts if prompt.text is None]
        beside = [] if config.beside == "none" else [p for p in free if fraction(p.id) < config.beside_share]
        given = {prompt.id for prompt in beside} if config.beside_instead else set()
        own = [prompt for prompt in free if prompt.id not in given]
        cast = [(config.source, own), (config.beside, beside), ("reference", standing)]
        return [(source, some) for source, some in cast if some]

    def _rollouts(self, text: Text, by: str, reward: float) -> list[Rollout]:
        """The text as it is learnt: once, or with a view "privileged" under both prompts."""
        config, prompt, completion = self._config.rollout, text.prompt, text.completion
        length = len(completion.token_ids)
        is_student = bool((completion.weight_versions >= 0).any())
        privileged = self._views.privileged(prompt)
        hint = self._hint(prompt, by, privileged)
        rollout = Rollout(
            id=f"{prompt.id}/{text.sample if by == config.source else by}",
            prompt_id=prompt.id,
            index=prompt.index * config.samples_per_prompt + text.sample,
            domain=prompt.domain,
            prompt_ids=self._views.own(prompt) if hint is None else hint,
            completion_ids=completion.token_ids,
            loss_mask=np.full(length, self._is_learnt("student" if is_student else "others"), dtype=np.bool_),
            student_logprobs=completion.logprobs,
            weight_versions=completion.weight_versions,
            finish_reason=completion.finish_reason,
            temperature=config.sampling.temperature,
            reward=reward,
            snapshot=by == "snapshot",
            privileged=hint is not None,
            teacher_context_ids=privileged,
            support_ids=completion.support_ids,
            support_logprobs=completion.support_logprobs,
            draw_ids=completion.draw_ids,
            draw_logprobs=completion.draw_logprobs,
            privacy=self._privacy(prompt, completion.token_ids),
        )
        return [rollout, _under_both(rollout)] if is_student and config.view == "privileged" else [rollout]

    async def _scored(self, rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[ScoredRollout]:
        if self._scoring is None:
            return [ScoredRollout(rollout=rollout, scores=None) for rollout in rollouts]
        return await self._scoring.score(rollouts, {prompt.id: self._views.messages(prompt) for prompt in prompts})

    def _is_learnt(self, origin: str) -> bool:
        """Whether a term is for text of this origin; a student's that none is for may still be judged."""
        return any(term.over in {"all", origin} for term in self._config.objective.terms.values())

    def _privacy(self, prompt: Prompt, token_ids: IntArray) -> FloatArray | None:
        if self._vocabulary is None:
            return None
        return privacy(self._vocabulary.written(token_ids.tolist()), prompt.private)

    def _hint(self, prompt: Prompt, by: str, privileged: IntArray | None) -> IntArray | None:
        """The teacher's own prompt, where the completion is of the share of references that are learnt under it."""
        if by != "reference" or fraction(prompt.id) >= self._config.rollout.privileged_share:
            return None
        assert privileged is not None, "checked by the plan"
        return None if np.array_equal(privileged, self._views.own(prompt)) else privileged  # nothing is left of it


def _under_both(rollout: Rollout) -> Rollout:
    """The same completion once more, to be learnt under the teacher's own prompt."""
    assert rollout.teacher_context_ids is not None, "checked by the plan"
    return dataclasses.replace(
        rollout, id=f"{rollout.id}/privileged", prompt_ids=rollout.teacher_context_ids, privileged=True
    )
