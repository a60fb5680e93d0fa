"""What stops a step: one error that names what is wrong, before anything has moved."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from learner.aggregation import Denominators
from learner.trainer import Trainer
from potstill.algebra.objective import Objective, Tier
from potstill.errors import AlignmentError, NonFinite, SignalLost
from tests.presets import BY_SERVER, EVERY, Batch, assert_same, batch_for, changed, computed, make_batch, trainer_of
from tests.trainers import SELF_TEACHER, VOCABULARY, denominators_of, make_trainer, same, weights_of


def check_refused(trainer: Trainer, batch: Batch, error: type[Exception], says: str, **denominators: int) -> None:
    """The step raises, and leaves weights, optimizer and version as they were."""
    before = weights_of(trainer.student)
    step = Denominators(**denominators) if denominators else denominators_of(trainer, batch)
    with pytest.raises(error, match=says):
        trainer.step(batch, step=1, denominators=step)
    assert same(weights_of(trainer.student), before)
    assert (trainer.version, len(trainer.optimizer.state)) == (0, 0)


@pytest.mark.parametrize("name", ["opd", "opd_sampled", "opsd", "paced", "sft", "grpo"])
def test_a_batch_that_is_masked_whole_is_refused(name: str) -> None:
    nothing = [changed(scored, loss_mask=np.zeros_like(scored.rollout.loss_mask)) for scored in make_batch()]
    trainer = trainer_of(name, teacher="self" if EVERY[name].tier == Tier.FULL else "server")
    with pytest.raises(ValueError, match="no step can be divided by"):
        denominators_of(trainer, nothing)
    check_refused(trainer, nothing, AlignmentError, "holds 0 tokens of 0 sequences", num_loss_tokens=1, num_sequences=1)


def test_a_batch_behind_closed_gates_is_refused() -> None:
    trainer = make_trainer(objective={"support": {"k": 3}, "gates": [{"kind": "window", "first": 50}]})
    check_refused(trainer, make_batch(), SignalLost, "step 1: every token counts for nothing")


UNSMOOTHED = {"gates": [{"kind": "pass_rate", "smoothing": 0.0}]}


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_pass_rates_that_leave_no_prompt_any_weight_are_refused(reward: float) -> None:
    batch = [changed(scored, reward=reward) for scored in make_batch()]
    trainer = make_trainer(method="paced", teacher=SELF_TEACHER, objective=UNSMOOTHED)
    check_refused(trainer, batch, ValueError, 'gate "pass_rate" leaves nothing to learn from.* smoothing')


def test_a_prompt_of_no_weight_beside_others_is_neither_learnt_nor_missed() -> None:
    batch = [changed(scored, reward=1.0) if scored.rollout.prompt_id == "p0" else scored for scored in make_batch()]
    other_text = [
        changed(scored, completion_ids=(scored.rollout.completion_ids + 1) % VOCABULARY)
        if scored.rollout.prompt_id == "p0"
        else scored
        for scored in batch
    ]
    one, other, learnt = (
        computed(make_trainer(method="paced", teacher=SELF_TEACHER, objective=objective), part)
        for part, objective in ((batch, UNSMOOTHED), (other_text, UNSMOOTHED), (other_text, {}))
    )
    assert_same(one, other)
    assert (learnt[1] - one[1]).norm() > 0.01 * one[1].norm()


@pytest.mark.parametrize("name", [name for name, objective in EVERY.items() if objective.reads_verdict])
def test_a_completion_that_was_not_judged_is_refused_by_name(name: str) -> None:
    batch = make_batch()
    batch[1] = changed(batch[1], reward=math.nan)
    teacher = "self" if EVERY[name].tier == Tier.FULL else "server"
    check_refused(trainer_of(name, teacher=teacher), batch, ValueError, "of prompt 'p0' has reward nan; was it judged?")


SCORES = ("topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail", "entropy")


def spoilt(batch: Batch, field: str) -> Batch:
    """One NaN at a loss token of each completion."""
    found = []
    for scored in batch:
        numbers = np.array(getattr(scored.scores, field))
        place = int(np.flatnonzero(scored.rollout.loss_mask)[0])
        numbers[(place, *(0,) * (numbers.ndim - 1))] = math.nan
        found.append(changed(scored, scores={field: numbers}))
    return found


@pytest.mark.parametrize("name", BY_SERVER)
def test_a_score_that_is_nan_stops_the_step_by_name_or_was_never_read(name: str) -> None:
    batch = batch_for(name)
    clean = computed(trainer_of(name, teacher="server"), batch)
    for field in SCORES:
        trainer = trainer_of(name, teacher="server")
        if field in read_by(EVERY[name]):
            check_refused(trainer, spoilt(batch, field), NonFinite, "term '|facts.teacher_entropy")
        else:
            found = computed(trainer, spoilt(batch, field))
            assert found[0] == clean[0]
            assert torch.equal(found[1], clean[1])


def read_by(objective: Objective) -> set[str]:
    """Which of SCORES the terms read that are compared with a teacher behind HTTP."""
    found = set()
    for term in objective.terms.values():
        if term.reads_scores:
            names = {"teacher_topk": "topk", "student_topk": "ids"}.get(term.support.kind)
            found |= {f"{names}_logprobs"} if names else set()
            found |= {f"{names}_tail"} if getattr(term.support, "rest", "") == "tail" else set()
            found |= {"entropy"} if any("teacher_entropy" in gate.kind for gate in term.gates) else set()
    return found


def test_every_score_is_read_by_some_preset() -> None:
    """The test above can fail for each of them."""
    assert set().union(*(read_by(EVERY[name]) for name in BY_SERVER)) == set(SCORES)


@pytest.mark.parametrize("name", ["opd", "gkd_topk", "opd_sampled"])
@pytest.mark.parametrize("field", ["sampled", "topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail"])
def test_scores_of_another_number_of_tokens_are_refused_by_name_whether_read_or_not(name: str, field: str) -> None:
    batch = make_batch()
    good = denominators_of(trainer_of(name, teacher="server"), batch)
    short = changed(batch[0], scores={field: getattr(batch[0].scores, field)[:-1]})
    numbers = {"num_loss_tokens": good.num_loss_tokens, "num_sequences": good.num_sequences}
    says = rf"rollout p0/0: scores\.{field} has \d rows for \d tokens"
    check_refused(trainer_of(name, teacher="server"), [short, *batch[1:]], AlignmentError, says, **numbers)
