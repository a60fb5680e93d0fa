"""Whom a sampler shall stay near, where a penalty is taken from its reward: log-probs of a step's completions.

    scores      a teacher's, which came with the rollouts
    reading     of a teacher whose every logit is at hand
    own prompt  of the current student under its own prompt, for text that it wrote under the teacher's (π-Distill)

Nothing here has a gradient. It takes no penalty and knows no reward: learner/credit.py asks, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from learner.facts import Logits
from learner.inner_teacher import InnerTeacher, Member
from learner.logprobs import id_logprobs
from learner.model import CausalModel
from learner.packing import plan_micro_batches
from learner.targets import aligned
from potstill.algebra.losses import PolicyGradient
from potstill.config import LearnerConfig, RunConfig
from potstill.errors import AlignmentError
from potstill.types import BoolArray, ScoredRollout


class Near(Protocol):
    """What credit is taken with."""

    def logprobs(self, batch: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> list[Tensor]:
        """[T_i] of each completion's tokens that its mask keeps. Raises AlignmentError where they cannot be had."""


class Reader(Protocol):
    """Whoever reads completions: a teacher in the learner, or one whose states were sent."""

    def read(self, part: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> Logits: ...


class Scores:
    """What a teacher said when it was asked."""

    def logprobs(self, batch: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> list[Tensor]:
        return [torch.from_numpy(aligned(scored).sampled[mask]) for scored, mask in zip(batch, masks, strict=True)]


class Reading:
    """What a reader's logits say, a micro-batch at a time."""

    def __init__(self, reader: Reader, config: LearnerConfig, device: torch.device) -> None:
        self._reader = reader
        self._config = config
        self._device = device  # of its logits

    @torch.no_grad()
    def logprobs(self, batch: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> list[Tensor]:
        lengths = [_num_tokens(scored) for scored in batch]
        found: dict[int, Tensor] = {}
        for indices in plan_micro_batches(lengths, max_tokens=self._config.micro_batch_tokens):
            part, own = [batch[i] for i in indices], [masks[i] for i in indices]
            written = [s.rollout.completion_ids[mask] for s, mask in zip(part, own, strict=True)]
            ids = torch.from_numpy(np.concatenate(written)).long().to(self._device)
            logprobs = id_logprobs(
                self._reader.read(part, own), ids[:, None], chunk_tokens=self._config.chunk_tokens
            ).cpu()
            parts = torch.split(logprobs[:, 0], [len(row) for row in written])
            found |= dict(zip(indices, parts, strict=True))
        return [found[i] for i in range(len(batch))]


class OwnPrompt:
    """The current student, which reads its own prompt. A completion that is learnt under both is read once."""

    def __init__(self, student: CausalModel, config: LearnerConfig) -> None:
        reader = InnerTeacher([Member(see=lambda packed: (student(packed), student.head))])
        self._reading = Reading(reader, config, student.head.device)

    def logprobs(self, batch: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> list[Tensor]:
        own = {scored.rollout.index: scored for scored in batch if not scored.rollout.privileged}
        if alone := [s.rollout.id for s in batch if s.rollout.index not in own]:
            raise AlignmentError(f"rollout {alone[0]} is not in the step under the student's own prompt")
        everywhere = [np.ones_like(scored.rollout.loss_mask) for scored in own.values()]
        whole = dict(zip(own, self._reading.logprobs(list(own.values()), everywhere), strict=True))
        return [whole[scored.rollout.index][torch.from_numpy(mask)] for scored, mask in zip(batch, masks, strict=True)]


def near_of(student: CausalModel, teacher: Reader | None, config: RunConfig) -> Near:
    """The objective's. `teacher`: one whose every logit is at hand."""
    losses = [term.loss for term in config.objective.terms.values()]
    if any(isinstance(loss, PolicyGradient) and loss.near == "own_prompt" for loss in losses):
        return OwnPrompt(student, config.learner)
    return Scores() if teacher is None else Reading(teacher, config.learner, student.head.device)


def _num_tokens(scored: ScoredRollout) -> int:
    """Packed, under the longer of its prompts."""
    rollout = scored.rollout
    prompts = [rollout.prompt_ids, *([] if rollout.teacher_context_ids is None else [rollout.teacher_context_ids])]
    return max(len(prompt) for prompt in prompts) + len(rollout.completion_ids) - 1
