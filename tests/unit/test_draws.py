"""Draws that the student made beside its text: asked of a teacher once each, and handed back as they were drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from learner.targets import gather
from learner.trainer import totals
from potstill.algebra.objective import Objective
from potstill.errors import AlignmentError
from potstill.methods import PRESETS
from potstill.teachers.chosen_ids import among, filled, width_of
from potstill.types import Rollout, ScoredRollout, TeacherScores
from potstill.wire import Ask, ScoreItem, ScoreRequest
from rollout_worker.scoring import Scoring
from tests.presets import changed
from tests.rollouts import IDENTITY, make_rollout, make_scores, random_batch
from tests.trainers import PLAIN, SELF_TEACHER, VOCABULARY, loss_and_gradient, make_network, make_trainer, plain_logits

TABLE = np.random.default_rng(0).normal(0, 2, (3, VOCABULARY))
TABLE -= np.log(np.exp(TABLE).sum(axis=1, keepdims=True))
DRAWS = [[4, 4, 9], [0, 1, 0], [7, 7, 7]]


def async_opd(m: int, **changes: Any) -> Objective:
    return Objective.model_validate(
        {**PRESETS["async_opd"].objective.model_dump(), "support": {"kind": "samples", "m": m}, **changes}
    )


def drawn(**fields: Any) -> Rollout:
    return make_rollout(completion=[4, 0, 7], draw_ids=DRAWS, draw_logprobs=np.full((3, 3), -1.0), **fields)


class Tabled:
    """A teacher whose distribution is TABLE, held to the rules of the wire."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: Any) -> list[TeacherScores]:
        ScoreRequest(model="m", items=tuple(items), ask=ask)
        self.asks.append(ask)
        return [self._scores(item) for item in items]

    def _scores(self, item: ScoreItem) -> TeacherScores:
        sampled = TABLE[np.arange(3), item.completion_ids]
        if item.token_ids is None:
            return make_scores(sampled=sampled)
        others = np.exp(TABLE)
        np.put_along_axis(others, item.token_ids, 0.0, axis=1)
        return make_scores(
            sampled=sampled,
            ids_logprobs=np.take_along_axis(TABLE, item.token_ids, axis=1),
            ids_tail=np.log(others.sum(axis=1)),
        )


async def scored(objective: Objective, *rollouts: Rollout) -> tuple[Tabled, list[ScoredRollout]]:
    teacher = Tabled()
    scoring = Scoring(teacher, IDENTITY, objective, hidden_size=0)  # type: ignore[arg-type]
    return teacher, await scoring.score(rollouts, {rollout.prompt_id: () for rollout in rollouts})


async def test_a_teacher_is_asked_of_distinct_ids_and_every_draw_gets_its_log_prob() -> None:
    teacher, (found,) = await scored(async_opd(3), drawn())
    assert teacher.asks == [Ask(num_ids=2)]  # no position has more of them
    assert found.scores is not None
    np.testing.assert_allclose(found.scores.draws, np.take_along_axis(TABLE, np.array(DRAWS), axis=1))
    assert found.scores.ids_logprobs is None


async def test_draws_and_the_students_top_k_are_asked_together_and_answered_apart() -> None:
    support = np.array([[4, 1], [2, 3], [7, 8]])
    beside = {"support": {"kind": "student_topk", "k": 2}, "loss": "reverse_kl", "over": "student"}
    objective = async_opd(3, auxiliaries={"top": beside})
    _, (found,) = await scored(objective, drawn(support_ids=support))
    assert found.scores is not None
    np.testing.assert_allclose(found.scores.draws, np.take_along_axis(TABLE, np.array(DRAWS), axis=1))
    np.testing.assert_allclose(found.scores.ids_logprobs, np.take_along_axis(TABLE, support, axis=1))
    outside = [np.log(sum(np.exp(TABLE[t, v]) for v in range(VOCABULARY) if v not in support[t])) for t in range(3)]
    np.testing.assert_allclose(found.scores.ids_tail, outside, rtol=1e-6)


async def test_text_without_draws_is_asked_beside_text_that_has_them() -> None:
    likely = {"support": "sampled", "loss": "likelihood", "over": "others"}
    compared = {"support": {"kind": "teacher_topk", "k": 2}, "loss": "forward_kl", "over": "others"}
    objective = async_opd(3, auxiliaries={"text": likely, "compared": compared})
    others = make_rollout(id="b/0", completion=[1, 2, 3], versions=[-1] * 3)
    _, (own, beside) = await scored(objective, drawn(), others)
    assert own.scores is not None
    assert own.scores.draws is not None
    assert beside.scores is not None
    assert beside.scores.draws is None


def test_ids_are_filled_up_with_the_lowest_that_are_not_there() -> None:
    ids = np.random.default_rng(1).integers(0, 9, (50, 6)).astype(np.int32)
    width = width_of(ids)
    assert width == max(len(set(row)) for row in ids.tolist())
    for row, wide in zip(ids.tolist(), filled(ids, width).tolist(), strict=True):
        own = sorted(set(row))
        assert wide == own + [v for v in range(9) if v not in own][: width - len(own)]


def test_what_was_said_of_some_ids_is_found_again_among_all_that_were_asked() -> None:
    ids = np.array([[3, 5, 8], [1, 0, 2]], np.int32)
    logprobs, rest = np.log(np.array([[0.5, 0.2, 0.1], [0.3, 0.3, 0.2]])), np.log([0.2, 0.2])
    kept, tail = among(ids, logprobs, rest, np.array([[8, 8], [0, 1]]))
    np.testing.assert_allclose(np.exp(kept), [[0.1, 0.1], [0.3, 0.3]])
    np.testing.assert_allclose(np.exp(tail), [0.9, 0.4], rtol=1e-6)


def gathered(batch: Sequence[ScoredRollout], *, inside: bool) -> Any:
    masks = [scored.rollout.loss_mask for scored in batch]
    return gather(batch, masks, async_opd(3), device=torch.device("cpu"), step=1, inside=inside, rewards={})


def test_the_draws_of_the_loss_tokens_are_facts_of_the_step() -> None:
    one = make_scores(sampled=[-1.0] * 3, draws=np.arange(9.0).reshape(3, 3))
    batch = [ScoredRollout(rollout=drawn(mask=[True, False, True]), scores=one)]
    found = gathered(batch, inside=False)
    assert found.sample_ids.tolist() == [DRAWS[0], DRAWS[2]]
    assert found.sample_behaviour.tolist() == [[-1.0] * 3] * 2
    assert found.sample_teacher.tolist() == [[0.0, 1.0, 2.0], [6.0, 7.0, 8.0]]
    assert gathered(batch, inside=True).sample_teacher is None


def test_a_micro_batch_of_text_that_the_student_did_not_write_needs_no_draws() -> None:
    compared = {"support": {"kind": "teacher_topk", "k": 2}, "loss": "forward_kl", "over": "others"}
    objective = async_opd(3, auxiliaries={"compared": compared})
    top = {"topk_ids": [[1, 2]], "topk_logprobs": [[-0.7, -1.0]], "topk_tail": [-2.0]}
    others = ScoredRollout(
        rollout=make_rollout(completion=[8], versions=[-1]), scores=make_scores(sampled=[-1.0], **top)
    )
    found = gather(
        [others], [np.array([True])], objective, device=torch.device("cpu"), step=1, inside=False, rewards={}
    )
    assert found.sample_ids is found.sample_teacher is None
    assert found.topk_ids is not None


def test_a_step_without_draws_is_refused_by_name() -> None:
    with pytest.raises(AlignmentError, match="no rollout carries draw_ids"):
        gathered([ScoredRollout(rollout=make_rollout(), scores=None)], inside=True)
    with pytest.raises(AlignmentError, match="did not send draws"):
        gathered([ScoredRollout(rollout=drawn(), scores=make_scores(sampled=[-1.0] * 3))], inside=False)


def test_a_teacher_in_the_learner_says_of_draws_what_a_server_would() -> None:
    """A frozen self-teacher that reads a prompt of its own, against its log-probs sent beside the rollouts."""
    network, batch = make_network(attention=PLAIN), random_batch([(3, 4), (2, 5)], vocabulary=VOCABULARY, seed=3)
    sent = []
    for one in batch:
        rollout = one.rollout
        assert rollout.teacher_context_ids is not None
        assert rollout.draw_ids is not None
        logp = plain_logits(network, rollout.teacher_context_ids, rollout.completion_ids).log_softmax(-1)
        draws = logp.gather(-1, torch.from_numpy(rollout.draw_ids).long())
        written = logp.gather(-1, torch.from_numpy(rollout.completion_ids[:, None]).long())[:, 0]
        sent.append(changed(one, scores={"draws": draws.detach().numpy(), "sampled": written.detach().numpy()}))
    objective = {"support": {"m": 3}}
    inner = make_trainer(method="async_opd", objective=objective, teacher=SELF_TEACHER)
    served = make_trainer(method="async_opd", objective=objective)
    expected, found = loss_and_gradient(served, sent), loss_and_gradient(inner, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-12)
    masks = served.masks(sent)
    assert totals(sent, masks)["student"].num_loss_tokens == 9
    moved = [
        dataclasses.replace(s, rollout=dataclasses.replace(s.rollout, draw_ids=s.rollout.draw_ids[::-1])) for s in sent
    ]
    assert loss_and_gradient(served, moved)[0] != pytest.approx(expected[0], rel=1e-3)
