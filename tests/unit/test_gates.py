"""Each gate by hand and by a slow loop; all of them one completion at a time, and only over what their term reads."""

from __future__ import annotations

import dataclasses
import doctest
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner import gates as module
from learner.facts import Facts
from learner.gates import early_weight, evidence, gate_factor, opener, top_share
from potstill.algebra.gates import (
    AlignedOneToOne,
    AlignedSpan,
    Confidence,
    EarlyWeight,
    EntropyGap,
    Evidence,
    Gate,
    Opener,
    PassRate,
    PerDomain,
    PerTeacher,
    StudentEntropyTop,
    TeacherEntropyAbove,
    Window,
)
from potstill.errors import ConfigError, NonFinite

READS: dict[Gate, tuple[str, ...]] = {
    TeacherEntropyAbove(nats=0.8): ("teacher_entropy",),
    EntropyGap(scale=0.7): ("student_entropy", "teacher_entropy"),
    StudentEntropyTop(share=0.3): ("student_entropy",),
    Opener(share=0.3): ("student_entropy",),
    EarlyWeight(gamma=0.5): ("teacher", "student"),
    Confidence(): ("teacher_topk",),
    PassRate(): ("pass_rate_weight",),
    Evidence(clip=0.2): ("teacher", "student", "reward"),
}
UNSCORED: tuple[Gate, ...] = (
    Window(first=1, last=4),
    PerDomain(weights={"math": 1.0, "code": 0.25}),
    PerTeacher(weights={"a": 2.0, "b": 0.0}),
    AlignedOneToOne(),
    AlignedSpan(),
)
every_gate = pytest.mark.parametrize("gate", [*READS, *UNSCORED], ids=lambda gate: str(gate.kind))
entropies = st.lists(st.floats(0, 12), min_size=1, max_size=30)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def facts_of(lengths: tuple[int, ...], *, seed: int = 0, **changes: Any) -> Facts:
    """All that gates read, at random; domains, teachers and rewards by completion."""
    dice = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def positive(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=dice, dtype=torch.float64)

    drawn = Facts(
        token_ids=torch.zeros(count, dtype=torch.long),
        lengths=lengths,
        positions=torch.tensor([place for length in lengths for place in range(length)]),
        origin=torch.zeros(count, dtype=torch.long),
        teacher=-positive(count),
        student=-positive(count),
        teacher_entropy=positive(count),
        student_entropy=positive(count),
        teacher_topk=-positive(count, 3),
        chunks=torch.arange(count),
        topk_ids=torch.where(positive(count, 1) > 1, torch.arange(3), -1),
        reward=(positive(len(lengths)) - 1).repeat_interleave(torch.tensor(lengths)),
        pass_rate_weight=positive(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        domains=tuple("math" if index % 2 else "code" for index in range(len(lengths))),
        teachers=tuple("a" if index % 3 else "b" for index in range(len(lengths))),
    )
    return dataclasses.replace(drawn, **changes)


def cut(facts: Facts, rows: Tensor, lengths: tuple[int, ...], **changes: Any) -> Facts:
    """These rows of it, which are completions of these lengths."""
    values = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    tensors = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(facts, lengths=lengths, **tensors, **changes)


def factor(gate: Gate, facts: Facts) -> list[float]:
    """Of all rows."""
    found: list[float] = gate_factor(gate, facts, torch.ones(sum(facts.lengths), dtype=torch.bool)).tolist()
    return found


def test_every_gate_of_the_algebra_is_tested_here() -> None:
    assert {type(gate) for gate in (*READS, *UNSCORED)} == set(get_args(get_args(Gate)[0]))


@every_gate
def test_a_factor_is_a_float64_constant_that_is_finite_and_not_negative(gate: Gate) -> None:
    drawn = facts_of((3, 0, 5))
    assert drawn.student_entropy is not None
    found = gate_factor(
        gate,
        dataclasses.replace(drawn, student_entropy=drawn.student_entropy.float().requires_grad_()),
        torch.ones(8, dtype=torch.bool),
    )
    assert (found.dtype, found.shape, found.requires_grad) == (torch.float64, (8,), False)
    assert bool((found.isfinite() & (found >= 0)).all())


@every_gate
@pytest.mark.parametrize("lengths", [(1,), (4, 7), (5, 0, 1, 12)])
def test_a_gate_sees_one_completion_at_a_time(gate: Gate, lengths: tuple[int, ...]) -> None:
    batch = facts_of(lengths)
    assert batch.domains is not None
    assert batch.teachers is not None
    alone: list[float] = []
    for length, domain, teacher in zip(lengths, batch.domains, batch.teachers, strict=True):
        rows = torch.arange(len(alone), len(alone) + length)
        alone += factor(gate, cut(batch, rows, (length,), domains=(domain,), teachers=(teacher,)))
    assert factor(gate, batch) == alone


@every_gate
def test_a_gate_reads_nothing_of_the_rows_that_its_term_does_not_read(gate: Gate) -> None:
    read = torch.tensor([True, False, True, True, False, False, True, True, False])
    whole = facts_of((4, 1, 4), domains=("code", "not listed", "code"), teachers=("b", "not listed", "b"))
    fields = {name for names in READS.values() for name in names}
    holed = dataclasses.replace(whole, **{name: getattr(whole, name).clone() for name in fields})
    for name in fields:
        getattr(holed, name)[~read] = torch.nan
    found = gate_factor(gate, holed, read)
    assert found[read].tolist() == factor(gate, cut(whole, read, (3, 2), domains=("code",) * 2, teachers=("b",) * 2))
    assert found[~read].tolist() == [0] * 4


@pytest.mark.parametrize(("gate", "name"), [(gate, name) for gate, names in READS.items() for name in names])
def test_a_field_that_was_not_gathered_is_named(gate: Gate, name: str) -> None:
    with pytest.raises(ValueError, match=rf"facts\.{name}, which is missing"):
        factor(gate, facts_of((3,), **{name: None}))


@pytest.mark.parametrize(("gate", "name"), [(gate, name) for gate, names in READS.items() for name in names])
def test_a_nan_in_a_row_that_is_read_closes_no_gate_in_silence(gate: Gate, name: str) -> None:
    facts = facts_of((3,))
    getattr(facts, name)[1] = torch.nan
    with pytest.raises(NonFinite, match=rf"gate .{gate.kind}. reads facts\.{name}, which is NaN"):
        factor(gate, facts)


def test_the_teacher_must_be_less_sure_than_the_threshold() -> None:
    assert factor(TeacherEntropyAbove(nats=0.8), facts_of((3,), teacher_entropy=f64(0.7, 0.8, 0.9))) == [0, 0, 1]


def test_the_entropy_gap_is_one_half_at_equal_entropies_and_opens_where_the_teacher_is_surer() -> None:
    facts = facts_of((3,), student_entropy=f64(1, 2, 1), teacher_entropy=f64(1, 1, 2))
    equal, surer, less_sure = factor(EntropyGap(scale=0.5), facts)
    assert equal == 0.5
    assert surer == pytest.approx(1 / (1 + math.exp(-2)))
    assert less_sure == pytest.approx(1 - surer)


@settings(deadline=None)
@given(entropies, st.sampled_from([0.05, 0.07, 0.1, 0.5, 1.0]))
def test_the_top_share_holds_the_highest_entropies_rounded_up(drawn: list[float], share: float) -> None:
    chosen = top_share(f64(*drawn), share).tolist()
    percent = round(100 * share)
    assert sum(chosen) == -(-len(drawn) * percent // 100)
    inside = [value for value, here in zip(drawn, chosen, strict=True) if here]
    outside = [value for value, here in zip(drawn, chosen, strict=True) if not here]
    assert max(outside, default=-1) <= min(inside)


def test_of_tokens_that_are_equally_unsure_the_earlier_are_chosen() -> None:
    assert top_share(f64(1, 0, 1, 1, 1), 0.4).tolist() == [True, False, True, False, False]


def test_a_tenth_of_each_completion_is_chosen_and_not_of_the_batch() -> None:
    lengths = (20, 31, 1)
    sure = facts_of(lengths).student_entropy
    assert sure is not None
    sure[:20] /= 1000
    found = gate_factor(
        StudentEntropyTop(share=0.1), facts_of(lengths, student_entropy=sure), torch.ones(52, dtype=torch.bool)
    )
    assert [part.sum().item() for part in found.split(lengths)] == [2, 4, 1]


def test_a_share_that_floats_cannot_hold_is_not_rounded_up_twice() -> None:
    assert 0.07 * 100 > 7
    assert top_share(torch.arange(100.0), 0.07).sum() == 7


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_an_opener_is_the_shortest_beginning_that_holds_its_share(drawn: list[int], share: float) -> None:
    length = 0
    while sum(drawn[:length]) < share * sum(drawn):
        length += 1
    assert opener(f64(*drawn), share).tolist() == [True] * length + [False] * (len(drawn) - length)


def test_openers_of_two_completions_do_not_depend_on_each_other() -> None:
    facts = facts_of((4, 3), student_entropy=f64(1, 1, 1, 1, 100, 1, 1))
    assert factor(Opener(share=0.5), facts) == [1, 1, 0, 0, 1, 0, 0]


def test_a_completion_without_entropy_has_no_opener() -> None:
    assert opener(f64(0, -1e-17, 0), 0.1).tolist() == [False] * 3


@settings(deadline=None)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=20), st.floats(0, 3))
def test_early_weights_lie_in_one_to_one_plus_gamma_and_fall(drawn: list[float], gamma: float) -> None:
    found = early_weight(f64(*drawn), gamma).tolist()
    assert all(1 <= weight <= 1 + gamma for weight in found)
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1
    total = sum(abs(value) for value in drawn)
    for place, weight in enumerate(found):
        passed = sum(abs(value) for value in drawn[: place + 1])
        assert weight == pytest.approx(1 + gamma * (1 - passed / total) if total > 0 else 1, abs=1e-12)


def test_a_gamma_of_zero_weighs_all_tokens_the_same() -> None:
    assert factor(EarlyWeight(gamma=0), facts_of((4, 3))) == [1] * 7


def test_early_weights_are_of_the_teachers_advantage() -> None:
    facts = facts_of((2,), teacher=f64(-1, -1), student=f64(-2, -4))
    assert factor(EarlyWeight(gamma=0.5), facts) == [1 + 0.5 * 3 / 4, 1]


def test_a_window_counts_positions_of_the_completion_and_not_loss_tokens() -> None:
    facts = facts_of((3, 2), positions=torch.tensor([0, 5, 9, 4, 5]))
    assert factor(Window(first=5), facts) == [0, 1, 1, 0, 1]
    assert factor(Window(first=1, last=5), facts) == [0, 0, 0, 1, 0]
    assert factor(Window(), facts) == [1] * 5


def test_confidence_is_the_teachers_highest_probability() -> None:
    facts = facts_of((2,), teacher_topk=f64(0.25, 0.5, 0.7, 0.1).log().reshape(2, 2))
    assert factor(Confidence(), facts) == pytest.approx([0.5, 0.7])


def test_confidence_of_a_teacher_inside_the_learner_comes_from_its_logits_a_few_rows_at_a_time() -> None:
    logits = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked: list[int] = []

    def teacher(rows: Tensor) -> Tensor:
        asked.extend(rows.tolist())
        assert len(rows) <= 128
        return logits[rows]

    read = torch.arange(300) % 3 != 0
    found = gate_factor(Confidence(), facts_of((300,), teacher_topk=None, teacher_logits=teacher), read)
    torch.testing.assert_close(found, torch.where(read, logits.softmax(-1).amax(-1), 0))
    assert asked == read.nonzero().squeeze(-1).tolist()


def test_a_domain_and_a_teacher_have_the_weight_that_is_listed() -> None:
    facts = facts_of((2, 1), domains=("math", "code"), teachers=("b", "a"))
    assert factor(PerDomain(weights={"math": 1.0, "code": 0.25}), facts) == [1, 1, 0.25]
    assert factor(PerTeacher(weights={"a": 2.0, "b": 0.0}), facts) == [0, 0, 2]


def test_a_domain_or_a_teacher_that_is_not_listed_is_named() -> None:
    facts = facts_of((2, 1), domains=("math", "law"), teachers=("a", "c"))
    with pytest.raises(ConfigError, match="no weight for domain 'law'; add it to: code, math"):
        factor(PerDomain(weights={"math": 1.0, "code": 0.25}), facts)
    with pytest.raises(ConfigError, match="no weight for teacher 'c'; add it to: a"):
        factor(PerTeacher(weights={"a": 1.0}), facts)


@pytest.mark.parametrize("gate", [PerDomain(weights={}), PerTeacher(weights={})])
def test_names_that_were_not_gathered_are_missing(gate: Gate) -> None:
    with pytest.raises(ValueError, match=r"facts\.(domains|teachers), which is missing"):
        factor(gate, facts_of((1,), domains=None, teachers=None))


def test_the_weight_of_a_pass_rate_is_the_one_of_the_step() -> None:
    assert factor(PassRate(), facts_of((2,), pass_rate_weight=f64(0.5, 1.5))) == [0.5, 1.5]


@settings(deadline=None)
@given(st.floats(-30, 30), st.floats(-2, 2), st.floats(0.01, 0.99))
def test_evidence_keeps_the_sign_of_the_reward(log_ratio: float, reward: float, clip: float) -> None:
    found = evidence(f64(log_ratio), f64(reward), clip).item()
    sign = (reward > 0) - (reward < 0)
    assert found == pytest.approx(min(max(math.exp(sign * log_ratio), 1 - clip), 1 + clip), abs=2.1e-9)
    assert found > 0


def test_evidence_with_a_vanishing_clip_is_the_reward_alone() -> None:
    found = factor(Evidence(clip=1e-9), facts_of((6, 5)))
    assert found == pytest.approx([1] * 11, abs=1e-8)


def test_evidence_bears_a_token_that_the_teacher_never_writes() -> None:
    facts = facts_of((3,), teacher=f64(-math.inf, -math.inf, -math.inf), reward=f64(1, -1, 0))
    assert factor(Evidence(clip=0.2), facts) == pytest.approx([0.8, 1.2, 1.0])


def test_the_examples_in_the_docstrings_are_true() -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
