"""Whom a sampler shall stay near: log-probs against plain transformers, and the reward that π-Distill makes of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from learner.credit import credit
from learner.judge import Verifier
from learner.nearness import OwnPrompt, Reading, Scores, near_of
from learner.trainer import Trainer
from potstill.errors import AlignmentError
from potstill.types import ScoredRollout
from tests.rollouts import make_rollout, make_scored
from tests.trainers import PLAIN, SELF_TEACHER, make_network, make_trainer, plain_logits

BETA = 0.25
MASK = [True, False, True]
TEXTS = (((1, 2), (3, 4, 5), 1.0), ((1, 2), (6, 7), 0.3), ((8,), (9, 10, 1), 0.0), ((8,), (2,), 1.0))


def written_twice() -> list[ScoredRollout]:
    """Four texts of two prompts, each under the student's prompt and then under the privileged one."""
    batch = []
    for index, (prompt, completion, reward) in enumerate(TEXTS):
        own = make_rollout(
            id=f"p{prompt[0]}/{index}",
            prompt=prompt,
            completion=completion,
            student=[-0.3 * (t + 1 + index) for t in range(len(completion))],
            teacher_context=(*prompt, 9, 9),
            mask=MASK[: len(completion)],
        )
        own = dataclasses.replace(own, index=index, reward=reward)
        assert own.teacher_context_ids is not None
        privileged = dataclasses.replace(
            own, id=f"{own.id}/privileged", prompt_ids=own.teacher_context_ids, privileged=True
        )
        batch += [ScoredRollout(rollout=rollout, scores=None) for rollout in (own, privileged)]
    return batch


def masks_of(batch: list[ScoredRollout]) -> list[Any]:
    return [scored.rollout.loss_mask for scored in batch]


def plainly(prompt: Any, completion: Any) -> torch.Tensor:
    """[T] log-probs of the student, seed 0, from an ordinary forward pass."""
    logits = plain_logits(make_network(attention=PLAIN), np.array(prompt), np.array(completion))
    return logits.log_softmax(-1)[range(len(completion)), list(completion)].detach()


def pi_distill(**learner: int) -> Trainer:
    return make_trainer(method="pi_distill", teacher=SELF_TEACHER, learner=learner)


@pytest.mark.parametrize(("micro_batch", "chunk"), [(1000, 512), (1, 512), (9, 1)])
def test_the_students_own_prompt_is_read_for_both_views_of_a_text(micro_batch: int, chunk: int) -> None:
    trainer = pi_distill(micro_batch_tokens=micro_batch, chunk_tokens=chunk)
    assert isinstance(trainer.near, OwnPrompt)
    batch = written_twice()
    found = trainer.near.logprobs(batch, masks_of(batch))
    for (prompt, completion, _), own, privileged in zip(TEXTS, found[::2], found[1::2], strict=True):
        expected = plainly(prompt, completion)[torch.tensor(MASK[: len(completion)])]
        torch.testing.assert_close(own, expected)
        torch.testing.assert_close(privileged, expected)
        assert not own.requires_grad


def test_a_text_that_lacks_its_own_view_is_refused_by_name() -> None:
    batch = written_twice()[1:]
    with pytest.raises(AlignmentError, match="p1/0/privileged is not in the step under the student's own prompt"):
        pi_distill().near.logprobs(batch, masks_of(batch))


def test_pi_distills_reward_is_less_the_gap_between_sampler_and_student_before_groups_are_compared() -> None:
    """R̃ = R − β mean_t(log π_T − log π_S), then normalised within each prompt (arXiv 2602.04942), written out."""
    trainer, batch = pi_distill(), written_twice()
    objective = trainer.config.objective
    found = credit(batch, masks_of(batch), objective, judge=Verifier(), near=trainer.near)
    punished = []
    for index, (prompt, completion, reward) in enumerate(TEXTS):
        student = plainly(prompt, completion).tolist()
        gaps = [-0.3 * (t + 1 + index) - student[t] for t in range(len(completion)) if MASK[t]]
        punished.append(reward - BETA * sum(gaps) / len(gaps))
    for first in (0, 2):
        one, other = punished[first : first + 2]
        for place, value in ((first, one), (first + 1, other)):
            for view in (2 * place, 2 * place + 1):
                assert found["reward"][view] == pytest.approx(value - (one + other) / 2, rel=1e-9)
                assert found["reward_deviation"][view] == pytest.approx(abs(one - other) / 2, rel=1e-9)
    plain = credit(batch, masks_of(batch), objective, judge=Verifier(), near=Same(batch))
    assert plain["reward"][0] == pytest.approx(0.35)  # a privilege that changes nothing costs nothing
    assert found["reward"][0] != pytest.approx(0.35, abs=1e-3)


class Same:
    """Whoever says of every token what the sampler said."""

    def __init__(self, batch: list[ScoredRollout]) -> None:
        self._said = {scored.rollout.id: torch.from_numpy(scored.rollout.student_logprobs) for scored in batch}

    def logprobs(self, batch: Any, masks: Any) -> list[torch.Tensor]:
        return [self._said[s.rollout.id][torch.from_numpy(mask)] for s, mask in zip(batch, masks, strict=True)]


def test_scores_that_came_with_the_rollouts_are_taken_as_they_are() -> None:
    scored = make_scored(sampled=[-0.5, -0.6, -0.7])
    (found,) = Scores().logprobs([scored], [np.array(MASK)])
    assert found.tolist() == [-0.5, -0.7]
    with pytest.raises(AlignmentError, match="carries no teacher's scores"):
        Scores().logprobs([ScoredRollout(rollout=make_rollout(), scores=None)], [np.array(MASK)])


def test_a_teacher_in_the_learner_is_read_under_its_own_prompt() -> None:
    objective = {"loss": {"kl_penalty": 0.1}}
    trainer = make_trainer(method="grpo", objective=objective, teacher=SELF_TEACHER)
    assert isinstance(trainer.near, Reading)
    batch = written_twice()[::2]
    found = trainer.near.logprobs(batch, masks_of(batch))
    for (prompt, completion, _), logprobs in zip(TEXTS, found, strict=True):
        expected = plainly((*prompt, 9, 9), completion)[torch.tensor(MASK[: len(completion)])]
        torch.testing.assert_close(logprobs, expected)
    assert isinstance(near_of(trainer.student, None, trainer.config), Scores)


def test_an_objective_without_a_penalty_asks_nobody() -> None:
    batch = written_twice()
    plain = make_trainer(method="grpo", teacher={"kind": "none"})
    found = credit(batch, masks_of(batch), plain.config.objective, judge=Verifier(), near=plain.near)
    assert not any(math.isnan(value) for value in found["reward"])
