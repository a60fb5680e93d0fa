"""Losses of chunks: shares, sums and minima; the path from scores to facts; and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.canaries import check
from learner.facts import Facts
from learner.gates import gate_factor
from learner.spans import credit, likelihood
from learner.targets import check_ids, gather, trainable
from learner.trainer import totals
from potstill.algebra.gates import AlignedOneToOne, AlignedSpan
from potstill.algebra.objective import Objective
from potstill.errors import AlignmentError
from potstill.methods import PRESETS
from potstill.methods.method import objective as made
from potstill.types import ScoredRollout
from tests.golden import make_facts
from tests.presets import assert_same, batch_for, computed, shrunk, trainer_of
from tests.rollouts import make_rollout, make_scored
from tests.trainers import PLAIN, VOCABULARY, make_network, make_trainer, plain_logits

NAMES = ("cross_tokenizer", "alm", "cross_tokenizer_hybrid")
TAU = 100.0


def double(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def facts(
    student: Sequence[float], teacher: Sequence[float], chunks: Sequence[int] | None, lengths: Sequence[int] = ()
) -> Facts:
    """Of one completion, unless `lengths` says otherwise."""
    return make_facts(
        lengths or [len(student)],
        token_ids=[0] * len(student),
        student=double(student),
        teacher=double(teacher),
        chunks=None if chunks is None else torch.tensor(chunks),
    )


# The credit.


def test_a_chunks_log_probs_as_the_teacher_would_have_them_add_up_to_its_own() -> None:
    found = facts([-0.3, -0.9, -0.1, -0.7], [-2.4, -2.4, -2.4, -0.5], [0, 0, 0, 1])
    target = credit(found) + found.student  # log p̂
    assert target[:3].sum().item() == pytest.approx(-2.4, abs=1e-12)
    assert target[3].item() == pytest.approx(-0.5, abs=1e-12)


def test_a_chunk_on_which_both_agree_teaches_nothing() -> None:
    assert credit(facts([-0.5, -1.0], [-1.5, -1.5], [0, 0])).tolist() == [0.0, 0.0]


def test_a_token_alone_has_the_plain_advantage() -> None:
    student, teacher = [-0.5, -1.0, -3.0], [-1.5, -0.2, -3.0]
    expected = pytest.approx([-1.0, 0.8, 0.0])
    assert credit(facts(student, teacher, None)).tolist() == expected
    assert credit(facts(student, teacher, [0, 1, 2])).tolist() == expected


def test_a_chunk_that_costs_the_student_nothing_is_shared_out_evenly() -> None:
    assert credit(facts([0.0, -1e-12], [-3.0, -3.0], [0, 0])).tolist() == pytest.approx([-1.5, -1.5], abs=1e-9)


def test_a_chunk_that_costs_the_student_hardly_anything_has_no_share_beyond_its_own() -> None:
    """L_T / L_S is 3e7 here."""
    assert credit(facts([-6e-8, -4e-8], [-3.0, -3.0], [0, 0])).tolist() == pytest.approx([-1.8, -1.2], rel=1e-6)


def test_chunks_far_apart_in_the_rows_are_added_up_and_others_are_not() -> None:
    found = credit(facts([-1.0, -2.0, -3.0], [-8.0, -5.0, -8.0], [7, 2, 7]))
    assert found.tolist() == pytest.approx([-1.0, -3.0, -3.0])


# The likelihood.


def loss_of(found: Facts, written: Tensor) -> Tensor:
    """Each completion's mean over tokens."""
    rows = likelihood(found, temperature=TAU).loss(written, torch.arange(len(written)))
    return torch.stack([part.mean() for part in rows.split(list(found.lengths))])


def test_the_minimum_lies_where_the_student_is_as_sure_of_the_chunk_as_the_teacher() -> None:
    grid = torch.arange(-6.0, -0.5, 0.01, dtype=torch.float64)
    losses = [loss_of(facts([0.4 * x, 0.6 * x], [-3.2, -3.2], [0, 0]), double([0, 0])).item() for x in grid.tolist()]
    assert grid[int(np.argmin(losses))].item() == pytest.approx(-3.2, abs=0.005)
    at_rest = likelihood(facts([-1.2, -2.0], [-3.2, -3.2], [0, 0]), temperature=TAU)
    assert at_rest.slope.abs().max() < 1e-15


def test_every_completion_means_over_its_chunks() -> None:
    student, teacher = [-0.2, -0.4, -1.0, -2.0, -0.1, -0.9], [-1.0, -1.0, -0.5, -3.0, -3.0, -3.0]
    found = facts(student, teacher, [0, 0, 1, 2, 2, 2], lengths=[3, 3])

    def one(student: float, teacher: float) -> float:
        p, q = math.exp(teacher / TAU), math.exp(student / TAU)
        return -p * math.log(q) - (1 - p) * math.log(1 - q)

    expected = [(one(-0.6, -1.0) + one(-1.0, -0.5)) / 2, one(-3.0, -3.0)]
    assert loss_of(found, double(student)).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_chunk_of_which_the_student_is_sure_has_a_finite_loss_and_is_still_unlearnt() -> None:
    found = likelihood(facts([0.0, -1e-9], [-5.0, -5.0], [0, 0]), temperature=TAU)
    assert found.value.isfinite().all()
    assert found.slope.isfinite().all()
    assert (found.slope > 0).all()


def test_a_chunk_whose_score_nobody_reads_spoils_no_other() -> None:
    found = facts([-1.0, -2.0, -3.0], [math.nan, math.nan, -3.5], [0, 0, 1])
    assert credit(found).isnan().tolist() == [True, True, False]
    assert likelihood(found, temperature=TAU).value.isnan().tolist() == [True, True, False]


# From scores to facts.

CREDIT = PRESETS["cross_tokenizer"].objective


def chunked(id: str, chunks: Sequence[int], *, mask: Sequence[bool] | None = None, **fields: Any) -> ScoredRollout:
    sampled = [math.nan if chunk < 0 else -1.0 - chunk for chunk in chunks]
    return make_scored(
        make_rollout(id=id, completion=[3] * len(chunks), mask=mask), sampled=sampled, chunks=chunks, **fields
    )


def gathered(batch: Sequence[ScoredRollout], objective: Objective = CREDIT) -> Facts:
    masks = [trainable(scored, objective, inside=False) for scored in batch]
    return gather(batch, masks, objective, device=torch.device("cpu"), step=1, inside=False, rewards={})


def test_chunks_of_different_completions_are_never_the_same() -> None:
    batch = [chunked("a/0", [0, 0, -1, 1]), make_scored(make_rollout(id="b/0")), chunked("c/0", [5, 5, 9])]
    assert gathered(batch).chunks.tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6]


def test_a_chunk_with_a_hole_in_the_mask_is_not_trained_on() -> None:
    scored = chunked("a/0", [0, 0, 1, 1, 2], mask=[True, True, True, False, True])
    assert trainable(scored, CREDIT, inside=False).tolist() == [True, True, False, False, True]


def test_scores_of_chunks_are_refused_by_an_objective_that_reads_tokens() -> None:
    with pytest.raises(AlignmentError, match="scored several tokens at once"):
        gathered([chunked("a/0", [0, 0])], PRESETS["opd_sampled"].objective)


def test_an_entry_without_an_id_is_refused_where_the_tokenizer_is_the_same() -> None:
    topk = {"topk_ids": [[0, -1], [1, 0]]}
    check_ids(chunked("a/0", [0, 1], **topk), vocabulary=VOCABULARY)
    with pytest.raises(AlignmentError, match=r"scores\.topk_ids holds an id outside"):
        check_ids(make_scored(make_rollout(completion=[3, 3]), **topk), vocabulary=VOCABULARY)
    with pytest.raises(AlignmentError, match=r"scores\.topk_ids holds an id outside"):
        check_ids(chunked("a/0", [0, 1], topk_ids=[[0, -2], [1, 0]]), vocabulary=VOCABULARY)


# Gates.


def test_the_two_gates_part_the_tokens_by_whether_the_top_k_is_there() -> None:
    found = make_facts(
        [3], token_ids=[0, 0, 0], chunks=torch.tensor([0, 1, 1]), topk_ids=torch.tensor([[4], [-1], [-1]])
    )
    read = torch.tensor([True, True, False])
    assert gate_factor(AlignedOneToOne(), found, read).tolist() == [1, 0, 0]
    assert gate_factor(AlignedSpan(), found, read).tolist() == [0, 1, 0]


def test_without_chunks_every_token_is_one_to_one() -> None:
    found, read = make_facts([2], token_ids=[0, 0]), torch.ones(2, dtype=torch.bool)
    assert gate_factor(AlignedOneToOne(), found, read).tolist() == [1, 1]
    assert gate_factor(AlignedSpan(), found, read).tolist() == [0, 0]


# Through the trainer.


def in_chunks(batch: Sequence[ScoredRollout], *, seed: int = 0) -> list[ScoredRollout]:
    """The same texts, scored by another tokenizer: chunks of one to three tokens, a top-k where it is one."""
    random, found = np.random.default_rng(seed), []
    for scored in batch:
        length = len(scored.rollout.completion_ids)
        chunks = np.repeat(np.arange(length), random.integers(1, 4, length))[:length].astype(np.int32)
        kept = np.isin(chunks, chunks[~scored.rollout.loss_mask], invert=True)
        alone = np.bincount(chunks)[chunks] == 1
        scores = scored.scores
        assert scores is not None
        found.append(
            make_scored(
                make_rollout(
                    id=scored.rollout.id,
                    prompt=scored.rollout.prompt_ids,
                    completion=scored.rollout.completion_ids,
                    mask=kept,
                    versions=scored.rollout.weight_versions,
                    student=scored.rollout.student_logprobs,
                ),
                sampled=np.where(kept, -3.0 * random.random(length)[chunks], math.nan),
                chunks=np.where(kept, chunks, -1),
                topk_ids=np.where((kept & alone)[:, None], scores.topk_ids, -1),
                topk_logprobs=np.where((kept & alone)[:, None], scores.topk_logprobs, math.nan),
                topk_tail=np.where(kept & alone, scores.topk_tail, math.nan),
            )
        )
    return found


@pytest.mark.parametrize("name", NAMES)
def test_chunks_may_lie_across_those_that_a_loss_sees_at_a_time(name: str) -> None:
    batch = in_chunks(batch_for(name))
    expected = computed(trainer_of(name, teacher="server", micro_batch_tokens=1000, chunk_tokens=100), batch)
    assert expected[1].abs().max() > 1e-6
    for size, chunk in ((8, 100), (1000, 1)):
        trainer = trainer_of(name, teacher="server", micro_batch_tokens=size, chunk_tokens=chunk)
        assert_same(computed(trainer, batch), expected)


def test_the_measured_reverse_kl_is_of_the_text_whatever_its_tokens() -> None:
    batch = [scored for scored in in_chunks(batch_for("cross_tokenizer")) if scored.rollout.origin == "student"]
    trainer = make_trainer(method="cross_tokenizer")
    masks, plain = trainer.masks(batch), make_network(attention=PLAIN)
    tally = trainer.accumulate(batch, masks, totals(batch, masks), step=1)
    expected = 0.0
    for scored, mask in zip(batch, masks, strict=True):
        rollout, scores = scored.rollout, scored.scores
        assert scores is not None
        assert scores.chunks is not None
        logq = plain_logits(plain, rollout.prompt_ids, rollout.completion_ids).log_softmax(-1)
        expected += sum(logq[t, token].item() for t, token in enumerate(rollout.completion_ids.tolist()) if mask[t])
        expected -= sum(scores.sampled[scores.chunks == chunk][0] for chunk in np.unique(scores.chunks[mask]))
    assert tally.sums["reverse_kl"].item() == pytest.approx(expected, rel=1e-9)


# What contradicts itself.


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"loss": "chunk_credit", "over": "all"}, 'over is "student"'),
        ({"loss": "chunk_credit", "over": "student", "support": "full"}, 'use "sampled"'),
        ({"loss": "chunk_likelihood", "support": "full"}, 'use "sampled"'),
        ({"loss": "chunk_likelihood", "correction": "truncated"}, "takes no correction"),
        ({"loss": "chunk_likelihood", "against": "reference"}, "is against the teacher"),
        ({"loss": "chunk_likelihood", "aggregation": {"kind": "token_budget", "tokens": 9}}, "whole chunks"),
        ({"loss": "chunk_likelihood", "gates": ["aligned_span"]}, "look for the teacher's top-k"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_way_out(choices: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(**choices)


def test_an_objective_says_whether_the_teacher_may_have_another_tokenizer() -> None:
    objectives = {name: preset.objective for name, preset in PRESETS.items() if preset.objective.reads_teacher}
    assert tuple(name for name, one in objectives.items() if one.crosses_tokenizers) == NAMES
    assert not made(
        loss="chunk_likelihood", auxiliaries={"token": {"loss": "k2", "over": "student"}}
    ).crosses_tokenizers


@pytest.mark.parametrize("name", ["cross_tokenizer", "cross_tokenizer_hybrid"])
def test_the_canaries_pass_for_scores_of_another_tokenizer(name: str) -> None:
    """The student's own scores are of its own tokens: chunks, and candidates that have no id, are the teacher's."""
    plain, batch = make_network(attention=PLAIN), []
    for scored in in_chunks(batch_for(name)):
        rollout = scored.rollout
        if rollout.origin == "student":
            logq = plain_logits(plain, rollout.prompt_ids, rollout.completion_ids).log_softmax(-1).detach()
            sampled = logq[range(len(logq)), rollout.completion_ids.tolist()].numpy()
            batch.append(dataclasses.replace(scored, rollout=dataclasses.replace(rollout, student_logprobs=sampled)))
    found = check(make_trainer(method=name, objective=shrunk(PRESETS[name].objective)), batch)
    assert found["mirror_loss"] == pytest.approx(0, abs=1e-9)
    assert found["scramble_change"] > 0.1
