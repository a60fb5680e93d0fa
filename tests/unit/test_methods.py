"""A method is a consistent point in the algebra, and says what it needs of a teacher."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from potstill.methods import PRESETS, Objective, Tier


def test_each_preset_needs_no_more_of_a_teacher_than_its_formula_reads():
    assert {name: method.objective.tier for name, method in PRESETS.items()} == {
        "opd": Tier.IDS,  # the student chose the ids
        "opd_sampled": Tier.SAMPLED,
        "gkd": Tier.TOPK,
        "opsd": Tier.FULL,
        "opsd_reverse": Tier.FULL,
        "sft": Tier.TEXT,
    }


def test_every_preset_says_what_it_is_and_where_it_comes_from():
    for method in PRESETS.values():
        assert method.phrase
        assert "arXiv" in method.source


def test_tiers_are_ordered_by_what_they_can_do():
    assert Tier.TEXT < Tier.SAMPLED < Tier.TOPK < Tier.IDS < Tier.FULL


def test_an_objective_round_trips_without_the_preset():
    for method in PRESETS.values():
        assert Objective(**method.objective.model_dump()) == method.objective


@pytest.mark.parametrize("k", [0, 129])
def test_k_is_bounded(k: int):
    with pytest.raises(ValidationError, match="k"):
        Objective(support="student_topk", divergence="reverse_kl", k=k)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_between_two_distributions_has_a_beta_strictly_between(beta: float):
    with pytest.raises(ValidationError, match="beta"):
        Objective(support="full", divergence="jsd", beta=beta)
