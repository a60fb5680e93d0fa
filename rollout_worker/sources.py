"""Where completions come from: an engine that writes them, two that take turns, a black box, or text that stands.

A source answers prompts and knows nothing of rewards, scores or what is learnt. Each text says how it was made: a token
that no engine of the student sampled has no log-prob and no version.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from potstill.config import SamplingConfig
from potstill.errors import ConfigError
from potstill.types import FinishReason, IntArray, Prompt
from rollout_worker.engine import Completion, GenerationRequest, RolloutEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_THE_STUDENT = -1  # the weights version of a token that the student did not write


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Completion number `sample` of a prompt."""

    prompt: Prompt
    sample: int
    completion: Completion


class Source(Protocol):
    async def write(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Completions of the prompts, those of one prompt side by side, in the order of the prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A model that samples `samples` completions of what `view` shows it of a prompt, seeded by run, prompt, sample.

    `is_student`: its tokens keep log-probs and versions. A model that is not is asked for neither.
    """

    engine: RolloutEngine
    view: Callable[[Prompt], IntArray]
    sampling: SamplingConfig
    samples: int
    seed: int
    is_student: bool
    support_k: int = 0

    async def write(self, prompts: Sequence[Prompt]) -> list[Text]:
        jobs = [(prompt, sample) for prompt in prompts for sample in range(self.samples)]
        completions = await self._generated([self._request(prompt, sample) for prompt, sample in jobs])
        return [
            Text(prompt=prompt, sample=sample, completion=completion if self.is_student else _nobodys(completion))
            for (prompt, sample), completion in zip(jobs, completions, strict=True)
        ]

    async def _generated(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Completions to their end: one that new weights have ended goes on under them from where it was."""
        found = await self.engine.generate(
            requests, self.sampling, want_logprobs=self.is_student, support_k=self.support_k
        )
        cut = [i for i, completion in enumerate(found) if completion.finish_reason is FinishReason.ABORTED]
        if cut:
            rest = await self._generated([self._continued(requests[i], found[i]) for i in cut])
            for i, ending in zip(cut, rest, strict=True):
                found[i] = joined(found[i], ending)
        return found

    def _continued(self, request: GenerationRequest, begun: Completion) -> GenerationRequest:
        limit = self.sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        return replace(
            request,
            prompt_ids=np.concatenate([request.prompt_ids, begun.token_ids]),
            seed=digest(f"{request.seed}/{len(begun.token_ids)}") >> 1,
            max_new_tokens=limit - len(begun.token_ids),
        )

    def _request(self, prompt: Prompt, sample: int) -> GenerationRequest:
        name = f"{prompt.id}/{sample}"
        return GenerationRequest(id=name, prompt_ids=self.view(prompt), seed=digest(f"{self.seed}/{name}") >> 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOff:
    """Answers that the student begins and a teacher ends (DASD, arXiv 2601.09088).

    The student's is cut after a random share of its tokens, `after` at least and never all; the teacher reads its own
    prompt and what is left. The whole has no log-probs and no version: nobody sampled it. `end` is the stop token.
    """

    student: Engine
    teacher: Engine
    after: float
    end: int

    async def write(self, prompts: Sequence[Prompt]) -> list[Text]:
        begun = [(text, self._kept(text)) for text in await self.student.write(prompts)]
        endings = await self.teacher.engine.generate(
            [self._request(text, kept) for text, kept in begun],
            self.teacher.sampling,
            want_logprobs=False,
            support_k=0,
        )
        return [
            replace(text, completion=foreign([*kept.tolist(), *ending.token_ids.tolist()], end=self.end))
            for (text, kept), ending in zip(begun, endings, strict=True)
        ]

    def _kept(self, text: Text) -> IntArray:
        share = self.after + (1 - self.after) * fraction(self._name(text))
        ids = text.completion.token_ids
        return ids[: min(int(share * len(ids)), len(ids) - 1)]

    def _request(self, text: Text, kept: IntArray) -> GenerationRequest:
        return GenerationRequest(
            id=f"{text.prompt.id}/{text.sample}",
            prompt_ids=np.concatenate([self.teacher.view(text.prompt), kept]),
            seed=digest(self._name(text)) >> 1,
            max_new_tokens=self.teacher.sampling.max_new_tokens - len(kept),
        )

    def _name(self, text: Text) -> str:
        return f"{self.teacher.seed}/{text.prompt.id}/{text.sample}/ending"


class Standing:
    """Text that nobody writes now: the ids that a prompt brings, or the data's own solution."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    async def write(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Raises ConfigError when the data has no solution for a prompt."""
        return [Text(prompt=prompt, sample=0, completion=self._standing(prompt)) for prompt in prompts]

    def _standing(self, prompt: Prompt) -> Completion:
        if isinstance(prompt.text, tuple):
            return foreign(prompt.text, end=self._tokenizer.eos_token_id)
        if not prompt.solution:
            raise ConfigError(
                f"prompt {prompt.id} has no solution to learn from: rollout.source or rollout.beside "
                '= "reference" and rollout.adaptive need one in every row of the data'
            )
        end = self._tokenizer.eos_token_id
        return foreign([*self._tokenizer.encode(prompt.solution, add_special_tokens=False), end], end=end)


def joined(begun: Completion, ending: Completion) -> Completion:
    """One completion of two parts, each token with the version that wrote it."""
    columns: dict[str, Any] = {
        name: None if getattr(begun, name) is None else np.concatenate([getattr(begun, name), getattr(ending, name)])
        for name in (column.name for column in fields(Completion))
        if name != "finish_reason"
    }
    return Completion(**columns, finish_reason=ending.finish_reason)


def foreign(ids: Sequence[int], *, end: int) -> Completion:
    """Tokens, at least one, that no engine of this run has sampled."""
    return Completion(
        token_ids=np.array(ids, dtype=np.int32),
        logprobs=np.full(len(ids), math.nan, dtype=np.float32),
        support_ids=None,
        support_logprobs=None,
        weight_versions=np.full(len(ids), NOT_THE_STUDENT, dtype=np.int32),
        finish_reason=FinishReason.STOP if ids[-1] == end else FinishReason.LENGTH,
    )


def fraction(name: str) -> float:
    """Of [0, 1), the same for a name, as of a prompt, for ever."""
    return digest(name) / 2**64


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _nobodys(completion: Completion) -> Completion:
    """The same tokens, without what would pass for the student's."""
    length = len(completion.token_ids)
    return Completion(
        token_ids=completion.token_ids,
        logprobs=np.full(length, math.nan, dtype=np.float32),
        support_ids=None,
        support_logprobs=None,
        weight_versions=np.full(length, NOT_THE_STUDENT, dtype=np.int32),
        finish_reason=completion.finish_reason,
    )
