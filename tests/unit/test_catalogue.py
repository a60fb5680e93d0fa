"""What every method must bear, over all presets and all ways to add up; and where each known danger is tested.

The catalogue of distillation's tests:
 1  no loss and no gradient at q = p            test_divergences.py, here
 2  gradients against closed forms              test_divergences.py, test_tempering.py, test_golden_classic.py
 3  limits of β, α, λ                           test_divergences.py, test_golden_onpolicy.py
 4  expected gradients of estimates, enumerated test_estimators.py, test_corrections.py
 5  the two-step tree, γ = 0 and 1              test_estimators.py
 6  supports: k = V, nested, where they end     test_supports.py, test_convergence.py
 7  numerics of the tail                        test_supports.py, test_scoring.py
 8  aggregation, whatever the split             test_aggregation.py, test_packing.py, here
 9  masks                                       test_targets.py, test_packing.py, here
10  alignment of prompts of different lengths   test_inner_teacher.py, test_packing.py, test_canaries.py, here
11  teachers without gradient; frozen, EMA, …   test_inner_teacher.py
12  schedules, budgets and their state          test_schedules.py, test_offpolicy.py, test_rewards.py,
                                                test_aggregation.py, test_checkpoint.py
13  a teacher that is the student               test_canaries.py, test_golden_selfdistilled.py, here
14  optima of a tabular policy                  test_convergence.py
15  variance of m draws                         test_estimators.py
16  DPO and Bradley-Terry at the start          test_pairs.py, test_golden_offline.py,
                                                test_golden_blackbox.py, test_discriminator.py
17  Plackett-Luce: normalised, ordered          test_rankings.py
18  bandits, replay, routing                    test_ensemble.py (Hedge; no UCB exists), test_offpolicy.py
19  tokens that the teacher rules out           test_divergences.py, test_tempering.py, test_trainer.py, test_scoring.py
20  chunked is dense                            test_head_loss.py, here

Traps seen in other code:
 1  the direction of a KL                       test_divergences.py, test_convergence.py
 2  β and λ the other way round                 test_divergences.py, test_convergence.py
 3  k1 differentiated                           test_estimators.py
 4  k3 without the ratio                        test_estimators.py
 5  the sampler's log-prob in the advantage     test_estimators.py, test_convergence.py
 6  mass pushed out of a top-k                  test_supports.py, test_convergence.py
 7  γ to i in place of i − t                    test_estimators.py
 8  a detached student in a mixture             test_divergences.py
 9  a clip that pushes down                     test_divergences.py, test_golden_selfdistilled.py
10  prefix for suffix, batch for sequence       test_rankings.py, test_gates.py
11  temperature twice, or once only             test_sampling.py, test_canaries.py, test_golden_classic.py
12  another template                            test_tokenization.py, test_collect.py, test_canaries.py
13  special tokens and padding of vocabularies  test_teacher_client.py, test_scoring.py, test_tempering.py
14  means of means                              test_packing.py, here
15  two ratios to one sampler                   test_corrections.py
16  answers that were cut                       test_engines.py (how they end; none is masked for it)
17  the own solution in the teacher's prompt    test_collect.py (the data's alone; no attempt is ever brought)
18  pass rates that leave no weight             test_rewards.py, test_refusals.py
19  TAID's loss of a part of the step           here
20  scores of another teacher                   test_teacher_client.py, test_teacher_engine.py
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.targets import budgeted, teacher_context
from learner.trainer import Trainer, totals
from potstill.types import ScoredRollout
from tests.presets import (
    BY_ITSELF,
    BY_SERVER,
    EVERY,
    STEP,
    Batch,
    Found,
    assert_same,
    batch_for,
    changed,
    computed,
    make_batch,
    shrunk,
    trainer_of,
)
from tests.rollouts import make_scores
from tests.trainers import PLAIN, SELF_TEACHER, make_network, make_trainer, plain_logits, take_step

# The catalogue itself.


def test_every_file_that_the_catalogue_names_exists_and_no_point_is_missing() -> None:
    files = {path.name for path in Path(__file__).parents[1].rglob("test_*.py")}
    catalogue, traps = (__doc__ or "").split("Traps seen in other code:")
    for part in (catalogue, traps):
        lines = re.findall(r"^ ?(\d+)  .*\.py|^ ?(\d+)  .*here$", part, re.MULTILINE)
        assert [int(one or other) for one, other in lines] == list(range(1, 21))
        assert set(re.findall(r"test_\w+\.py", part)) <= files


# 8, 20: no way to split a step changes it.


@pytest.mark.parametrize(
    ("name", "teacher"), [(name, "server") for name in BY_SERVER] + [(name, "self") for name in BY_ITSELF]
)
def test_no_preset_depends_on_micro_batches_or_chunks(name: str, teacher: str) -> None:
    batch = batch_for(name)
    expected = computed(trainer_of(name, teacher=teacher, micro_batch_tokens=1000, chunk_tokens=100), batch)
    assert expected[1].abs().max() > 1e-6
    for size, chunk in ((8, 100), (1000, 1)):
        trainer = trainer_of(name, teacher=teacher, micro_batch_tokens=size, chunk_tokens=chunk)
        assert_same(computed(trainer, batch), expected)


AGGREGATIONS: dict[str, dict[str, Any]] = {
    "token_mean": {"kind": "token_mean"},
    "sequence_mean": {"kind": "sequence_mean"},
    "sequence_sum": {"kind": "sequence_sum"},
    "constant": {"kind": "constant", "length": 6},
    "token_budget, cut": {"kind": "token_budget", "tokens": 13},
    "token_budget, not full": {"kind": "token_budget", "tokens": 1000},
}
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS.values(), ids=AGGREGATIONS)


def mixed(aggregation: Mapping[str, Any], **learner: int) -> Trainer:
    """A term for the student's text, one for the text of others and one for all of it."""
    gold = {"over": "others", "loss": "likelihood", "weight": 0.5, "aggregation": aggregation}
    both = {
        "support": {"kind": "teacher_topk", "k": 3},
        "loss": "jsd",
        "weight": 0.3,
        "aggregation": aggregation,
    }
    objective = {"support": {"k": 3}, "aggregation": aggregation, "auxiliaries": {"gold": gold, "both": both}}
    return make_trainer(objective=objective, learner=learner)


@every_aggregation
def test_micro_batches_chunks_and_order_change_no_way_of_adding_up(aggregation: dict[str, Any]) -> None:
    """A budget keeps what it keeps: its masks are those of the step, made before it is split or laid out."""
    batch = make_batch()
    masks = budgeted(batch, mixed(aggregation).masks(batch), mixed(aggregation).config.objective, step=STEP)
    whole = totals(batch, masks)
    expected = computed(mixed(aggregation), batch, masks, whole)
    for size, chunk in ((8, 512), (20, 1), (1000, 3)):
        trainer = mixed(aggregation, micro_batch_tokens=size, chunk_tokens=chunk)
        assert_same(computed(trainer, batch, masks, whole), expected)
    assert_same(computed(mixed(aggregation), batch[::-1], masks[::-1], whole), expected)


@every_aggregation
@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_add_up_whatever_the_aggregation_and_whoever_wrote_their_part(
    aggregation: dict[str, Any], ranks: int
) -> None:
    """With nine ranks each holds one completion: most lack a term's text altogether."""
    batch, trainer = make_batch(), mixed(aggregation)
    masks = budgeted(batch, trainer.masks(batch), trainer.config.objective, step=STEP)
    whole = totals(batch, masks)
    expected = computed(trainer, batch, masks, whole)
    parts = [computed(trainer, batch[rank::ranks], masks[rank::ranks], whole) for rank in range(ranks)]
    assert_same((sum(loss for loss, _ in parts), sum(gradient for _, gradient in parts)), expected)  # type: ignore[arg-type]


@every_aggregation
def test_a_completion_without_loss_tokens_changes_nothing(aggregation: dict[str, Any]) -> None:
    batch = make_batch()
    empty = changed(batch[0], id="p0/9", loss_mask=np.zeros_like(batch[0].rollout.loss_mask))
    without = mixed(aggregation).masks(batch)
    kept = budgeted(batch, without, mixed(aggregation).config.objective, step=STEP)
    whole = totals(batch, kept)
    expected = computed(mixed(aggregation), batch, kept, whole)
    assert totals([empty, *batch], [empty.rollout.loss_mask, *kept]) == whole
    assert_same(computed(mixed(aggregation), [empty, *batch], [empty.rollout.loss_mask, *kept], whole), expected)


def test_each_term_divides_by_the_text_that_it_is_over() -> None:
    """Likelihood of everybody's text, three times, against sums written out."""
    batch, plain = make_batch(), make_network(attention=PLAIN)
    trainer = make_trainer(
        method="sft",
        teacher={"kind": "none"},
        objective={
            "aggregation": "sequence_mean",
            "auxiliaries": {
                "own": {"over": "student", "loss": "likelihood", "weight": 0.5},
                "all": {"loss": "likelihood", "weight": 0.1, "aggregation": "sequence_sum"},
            },
        },
    )
    costs: dict[str, list[list[float]]] = {"student": [], "others": []}
    for scored in batch:
        rollout = scored.rollout
        logq = plain_logits(plain, rollout.prompt_ids, rollout.completion_ids).log_softmax(-1)
        written = [-logq[t, token].item() for t, token in enumerate(rollout.completion_ids) if rollout.loss_mask[t]]
        costs[rollout.origin].append(written)
    others, own = costs["others"], costs["student"]
    expected = {
        "main": sum(sum(text) / len(text) for text in others) / len(others),
        "own": 0.5 * sum(map(sum, own)) / sum(map(len, own)),
        "all": 0.1 * (sum(map(sum, own)) + sum(map(sum, others))) / (len(own) + len(others)),
    }
    masks = trainer.masks(batch)
    found = trainer.accumulate(batch, masks, totals(batch, masks), step=1).losses
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-10)


def test_taid_moves_by_the_loss_of_the_whole_step() -> None:
    """Trap 19: whatever the micro-batches, t rises alike."""

    def after_three_steps(size: int) -> float:
        objective = {"target": {"rate": 0.5, "momentum": 0.0}}
        learner = {"micro_batch_tokens": size}
        trainer = make_trainer(method="taid", teacher=SELF_TEACHER, objective=objective, learner=learner, steps=1000)
        for step in (1, 2, 3):
            take_step(trainer, make_batch(), step)
        return trainer.schedules.values()["main"]

    assert after_three_steps(8) == pytest.approx(after_three_steps(1000), rel=1e-9)
    assert after_three_steps(8) > 0.5  # the straight line is at 0.4018


# 9: what is masked is not read.


@pytest.mark.parametrize("name", BY_SERVER)
def test_what_is_known_of_a_masked_token_changes_nothing(name: str) -> None:
    """Its scores and the sampler's log-prob may be missing; its id stays, as context of what follows."""

    def without(values: Any, mask: Any) -> Any:
        spoilt = np.array(values)
        spoilt[~mask] = math.nan if spoilt.dtype.kind == "f" else 0
        return spoilt

    batch = batch_for(name)
    spoilt = []
    for scored in batch:
        mask = scored.rollout.loss_mask
        scores = {
            field: without(getattr(scored.scores, field), mask)
            for field in (
                *("sampled", "draws", "topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail"),
                "entropy",
            )
        }
        student = without(scored.rollout.student_logprobs, mask)
        spoilt.append(changed(scored, scores=scores, student_logprobs=student))
    assert not all(scored.rollout.loss_mask.all() for scored in batch)
    loss, gradient = computed(trainer_of(name, teacher="server"), batch)
    found = computed(trainer_of(name, teacher="server"), spoilt)
    assert found[0] == loss
    assert torch.equal(found[1], gradient)


# 10: the same completion token on both sides.


def test_a_teacher_that_reads_another_prompt_is_compared_token_by_token() -> None:
    """Against plain transformers, one sequence at a time; with the teachers' prompts shuffled it is another loss."""
    batch, plain = make_batch(), make_network(attention=PLAIN)
    shuffled = [
        changed(scored, teacher_context_ids=other.rollout.teacher_context_ids)
        for scored, other in zip(batch, reversed(batch), strict=True)
    ]

    def expected(batch: Batch) -> float:
        costs = []
        for scored in batch:
            r = scored.rollout
            own = plain_logits(plain, r.prompt_ids, r.completion_ids).log_softmax(-1)
            other = plain_logits(plain, teacher_context(r, privileged=True), r.completion_ids).log_softmax(-1)
            costs += (own.exp() * (own - other)).sum(-1)[torch.from_numpy(r.loss_mask)].tolist()
        return sum(costs) / len(costs)

    def found(batch: Batch) -> float:
        objective = {"over": "all", "aggregation": "token_mean"}
        trainer = make_trainer(method="opsd_reverse", teacher=SELF_TEACHER, objective=objective)
        return computed(trainer, batch)[0]

    lengths = {len(teacher_context(s.rollout, privileged=True)) - len(s.rollout.prompt_ids) for s in shuffled}
    assert len(lengths) == 3  # no constant shift would align them
    assert found(batch) == pytest.approx(expected(batch), rel=1e-9)
    assert found(shuffled) == pytest.approx(expected(shuffled), rel=1e-9)
    assert abs(found(shuffled) - found(batch)) > 0.01 * found(batch)


# 1, 13: a teacher that is the student.


def untold(batch: Batch) -> Batch:
    """The teacher's own prompt tells no more than the student's."""
    return [changed(scored, teacher_context_ids=scored.rollout.prompt_ids) for scored in batch]


VANISHING = [name for name in BY_ITSELF if EVERY[name].vanishes_at_teacher]


@pytest.mark.parametrize("name", VANISHING)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(name: str) -> None:
    """The main term alone; a drawn target is right in the mean only."""
    objective = shrunk(EVERY[name]) | {"auxiliaries": {aux: {"weight": 0.0} for aux in EVERY[name].auxiliaries}}
    batch = untold(make_batch())

    def found(batch: Batch) -> Found:
        trainer = make_trainer(method=name, objective=objective, teacher=SELF_TEACHER, steps=2 * STEP)
        masks = trainer.masks(batch)
        tally = trainer.accumulate(batch, masks, totals(batch, masks), step=1)
        gradients = [p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None]
        return tally.losses["main"].item(), torch.cat(gradients)

    loss, gradient = found(batch)
    assert abs(loss) < 1e-12
    assert gradient.abs().max() < 1e-12
    assert found(make_batch())[1].abs().max() > 1e-4  # told more, it has


def test_a_teacher_of_equal_weights_and_other_numerics_is_worth_a_millionth_of_a_nat() -> None:
    """Scores from plain attention in float32, the student's from packed attention in float64."""
    plain = make_network(attention=PLAIN).float()
    batch = []
    for scored in make_batch():
        rollout = scored.rollout
        logp = plain_logits(plain, rollout.prompt_ids, rollout.completion_ids).log_softmax(-1).detach()
        sampled = logp[range(len(logp)), rollout.completion_ids.tolist()].numpy()
        batch.append(
            ScoredRollout(
                rollout=dataclasses.replace(rollout, student_logprobs=sampled), scores=make_scores(sampled=sampled)
            )
        )
    metrics = take_step(make_trainer(method="opd_sampled"), batch, 1).metrics
    assert 0 < abs(metrics["reverse_kl"]) < 1e-6
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["grad_norm"] < 1e-5
