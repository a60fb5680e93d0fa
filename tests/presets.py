"""Every preset at work on one batch: prompts of several lengths, masks with holes, the student's text and others'.

The student is not where the run found it, so that no two of student, teacher, reference and sampler are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.aggregation import Denominators
from learner.ranks import Ranks
from learner.targets import budgeted
from learner.trainer import Trainer, totals
from potstill.algebra.objective import Objective, Tier
from potstill.methods import PRESETS
from potstill.types import ScoredRollout
from tests.rollouts import random_batch
from tests.trainers import SELF_TEACHER, VOCABULARY, make_trainer

Batch = list[ScoredRollout]
Found = tuple[float, Tensor]
"""Loss and gradient."""

REWARDS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # of each prompt's answers by the student
STEP = 500  # where every ramp of a preset is under way or past its switch


def changed(scored: ScoredRollout, *, scores: Mapping[str, Any] | None = None, **rollout: Any) -> ScoredRollout:
    assert scored.scores is not None
    return ScoredRollout(
        rollout=dataclasses.replace(scored.rollout, **rollout),
        scores=dataclasses.replace(scored.scores, **(scores or {})),
    )


def make_batch(*, own: int = 2) -> Batch:
    """Three prompts of different lengths with `own` answers of the student and one of others each, masks with holes.

    Every field is filled: rewards, entropies, a teacher's own prompt. Nobody judged the text of others.
    """
    random = np.random.default_rng(1)
    batch: Batch = []
    for number, num_prompt in enumerate((3, 1, 5)):
        written = {
            by: random_batch(
                [(num_prompt, int(random.integers(2, 6))) for _ in range(own if by == "student" else 1)],
                vocabulary=VOCABULARY,
                seed=10 * number + (by == "others"),
                by=by,
            )
            for by in ("student", "others")
        }
        first = written["student"][0].rollout
        for index, scored in enumerate([*written["student"], *written["others"]]):
            length = len(scored.rollout.completion_ids)
            mask = random.random(length) < 0.7
            mask[index % length] = True
            batch.append(
                changed(
                    scored,
                    scores={"entropy": 2 * random.random(length)},
                    id=f"p{number}/{index}",
                    prompt_id=f"p{number}",
                    index=own * number + index,
                    prompt_ids=first.prompt_ids,
                    teacher_context_ids=first.teacher_context_ids,
                    loss_mask=mask,
                    reward=REWARDS[number][index] if index < own else math.nan,
                )
            )
    return batch


def batch_for(name: str) -> Batch:
    """Pairs for a preference over the student's text, groups for everything else."""
    objective = PRESETS[name].objective
    return make_batch(own=1 if objective.compares_completions and objective.compares_with_others else 2)


def shrunk(objective: Objective) -> dict[str, Any]:
    """Changes that make every top-k fit the vocabulary and all draws the batch, the auxiliary terms' too."""
    small = {
        name: {"support": {width: 3}}
        for name, term in objective.terms.items()
        for width in ("k", "m")
        if getattr(term.support, width, 0) > 3
    }
    return {**small.pop("main", {}), "auxiliaries": small}


def trainer_of(name: str, *, teacher: str = "self", ranks: Ranks | None = None, **learner: int) -> Trainer:
    """The preset's, its student some steps away from the one that the run found."""
    trainer = make_trainer(
        method=name,
        objective=shrunk(PRESETS[name].objective),
        teacher=SELF_TEACHER if teacher == "self" else None,
        learner=learner,
        steps=2 * STEP,
        ranks=ranks,
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.student.parameters():
            moved = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(trainer.student.ranks.lay(moved, like=parameter))
    return trainer


def computed(
    trainer: Trainer, batch: Batch, masks: Sequence[Any] | None = None, whole: Mapping[str, Denominators] | None = None
) -> Found:
    """Of the whole step, or of a part with its masks and the denominators of the whole."""
    masks = trainer.masks(batch) if masks is None else masks
    masks = budgeted(batch, masks, trainer.config.objective, step=STEP) if whole is None else masks
    tally = trainer.accumulate(batch, masks, whole or totals(batch, masks), step=STEP)
    parameters = list(trainer.student.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    return sum(loss.item() for loss in tally.losses.values()), torch.cat([g.flatten() for g in gradients])


def assert_same(found: Found, expected: Found) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-10, abs=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-12)


EVERY = {name: method.objective for name, method in PRESETS.items()}
BY_SERVER = [name for name, objective in EVERY.items() if objective.tier < Tier.FULL]
BY_ITSELF = [name for name, objective in EVERY.items() if objective.reads_teacher]
