"""What is known of a micro-batch's loss tokens before its loss is taken. Nothing here has a gradient.

Legend: N loss tokens of S completions, in packed order; K ids of a top-k, M draws, V vocabulary. A field that no term
of the objective reads is None, but for `behaviour` and `age`, of which a step's health is measured. A row that no term
reads may hold NaN; a row that one reads never does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from potstill.section import Ramp, at

Logits = Callable[[Tensor], Tensor]
"""Row indices [C] → logits [C, V] in float32, no gradient: states are kept, logits never."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Example for two completions of 2 and 1 loss tokens: lengths (2, 1), token_ids [50, 2, 7], positions [0, 1, 0]."""

    token_ids: Tensor  # [N] i64, the written tokens
    lengths: tuple[int, ...]  # [S] loss tokens of each completion
    positions: Tensor  # [N] i64, of the token in its completion
    origin: Tensor  # [N] i64, see ORIGINS
    behaviour: Tensor | None = None  # [N] sampler's log-probs of the written tokens
    age: Tensor | None = None  # [N] i64, versions from the one that wrote the token to the student; -1: not the student
    teacher: Tensor | None = None  # [N] teacher's
    reference: Tensor | None = None  # [N] those of the student as the run found it
    teacher_entropy: Tensor | None = None  # [N] nats
    support_ids: Tensor | None = None  # [N, K] the student's top-k when it sampled
    teacher_support: Tensor | None = None  # [N, K] teacher's log-probs of support_ids
    teacher_rest: Tensor | None = None  # [N] log of the teacher's mass outside support_ids
    topk_ids: Tensor | None = None  # [N, K] the teacher's own top-k
    teacher_topk: Tensor | None = None  # [N, K]
    topk_rest: Tensor | None = None  # [N]
    sample_ids: Tensor | None = None  # [N, M] draws of the student at each position
    sample_behaviour: Tensor | None = None  # [N, M] log-probs with which they were drawn
    sample_teacher: Tensor | None = None  # [N, M]
    teacher_logits: Logits | None = None  # of a teacher inside the learner, or whose states were sent
    reference_logits: Logits | None = None
    reward: Tensor | None = None  # [N] of the completion, less its group's mean
    reward_deviation: Tensor | None = None  # [N] of its group
    pass_rate_weight: Tensor | None = None  # [N] of the prompt (gate "pass_rate"), scaled over the step
    privacy: Tensor | None = None  # [N] in [0, 1]
    uniforms: Tensor | None = None  # [N, U] of [0, 1), seeded by completion and step: the loss's only randomness
    chunks: Tensor | None = None  # [N] i64, the same for tokens that were scored together; None: each by itself
    prompts: tuple[str, ...] | None = None  # [S] ids
    domains: tuple[str, ...] | None = None  # [S]
    teachers: tuple[str, ...] | None = None  # [S] names
    student: Tensor | None = None  # [N] the current student's log-probs of the written tokens (look.py)
    student_entropy: Tensor | None = None  # [N] nats (look.py)

    @cached_property
    def sequence(self) -> Tensor:
        """[N] index of each token's completion."""
        counts = torch.tensor(self.lengths, device=self.token_ids.device)
        return torch.arange(len(self.lengths), device=counts.device).repeat_interleave(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where the run stands: what makes one objective another loss at another step."""

    step: int  # optimizer step, counted from 1
    steps: int  # of the run
    schedule: Mapping[str, float]  # by term: what its schedule says now (learner/schedules.py)

    def at(self, value: float | Ramp) -> float:
        """What a number that may be a ramp is now."""
        return at(value, step=self.step, steps=self.steps)


ORIGINS = {"student": 0, "privileged": 1, "others": 2}
"""Who wrote a completion, and under which prompt it is learnt; privileged: the student, under the teacher's."""


def read_by(over: str, origin: Tensor) -> Tensor:
    """[N] whether a term over "all", "student", … reads each token."""
    return torch.ones_like(origin, dtype=torch.bool) if over == "all" else origin == ORIGINS[over]


def known(value: Tensor | None, name: str) -> Tensor:
    """The field, or a ValueError that names it when it was not gathered."""
    if value is None:
        raise ValueError(f"the objective reads facts.{name}, which is missing")
    return value
