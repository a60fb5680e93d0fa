"""A method is a consistent point in the algebra, and says what it needs."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from potstill.algebra.objective import Objective, Tier
from potstill.config import RunConfig
from potstill.config_page import models_in
from potstill.methods import PRESETS
from potstill.methods.method import objective
from potstill.section import Ramp, at


def test_presets_need_no_more_of_a_teacher_than_their_formulas_read():
    known = {
        "opd": Tier.IDS,  # the student chose the ids
        "opd_sampled": Tier.SAMPLED,
        "gkd": Tier.FULL,
        "gkd_topk": Tier.TOPK,
        "opsd": Tier.FULL,
        "sft": Tier.TEXT,
    }
    assert {name: PRESETS[name].objective.tier for name in known} == known


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is_where_it_comes_from_and_what_it_needs(name: str):
    method = PRESETS[name]
    assert method.phrase
    assert len(method.phrase) <= 110
    assert method.source
    assert method.needs["teacher"] == (method.objective.tier.name.lower() if method.objective.tier else "none")


def settable(key: str) -> bool:
    """Whether some config has this dotted key."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in key.split("."):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if not fields:
            return False
        models = [model for field in fields for model in models_in(field.annotation)]
    return True


@pytest.mark.parametrize("name", PRESETS)
def test_a_papers_settings_are_settings_of_the_config(name: str):
    """A dotted key that no config has would be compared with nothing."""
    assert [key for key in PRESETS[name].settings if not settable(key)] == []


def test_a_key_that_no_config_has_is_not_settable():
    assert settable("rollout.sampling.top_p")
    assert not settable("rollout.sampling.top_q")


def test_tiers_are_ordered_by_what_they_can_do():
    assert Tier.TEXT < Tier.SAMPLED < Tier.TOPK < Tier.IDS < Tier.FULL


@pytest.mark.parametrize("name", PRESETS)
def test_an_objective_round_trips_without_the_preset(name: str):
    assert Objective(**PRESETS[name].objective.model_dump()) == PRESETS[name].objective


def test_needs_are_those_of_every_term():
    made = objective(
        support="full",
        loss="forward_kl",
        gates=["pass_rate"],
        target="taid",
        auxiliaries={
            "text": {"loss": "likelihood", "over": "others"},
            "anchor": {"loss": "k2", "over": "student", "against": "reference"},
        },
    )
    assert made.tier is Tier.FULL
    assert made.reads_reward
    assert made.reads_reference
    assert made.reads_others
    assert made.carries_state
    assert [term.loss.kind for term in made.scored("others")] == ["forward_kl"]


def test_a_term_against_the_reference_asks_nothing_of_a_teacher():
    assert objective(loss="k2", over="student", against="reference").tier is Tier.TEXT


def test_a_ramp_is_flat_outside_its_steps_and_straight_between():
    ramp = Ramp(start=1.0, end=0.0, from_step=3, to_step=7)
    assert [at(ramp, step=step, steps=50) for step in (1, 3, 5, 7, 100)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert at(0.25, step=9, steps=50) == 0.25


def test_a_ramp_without_an_end_ends_with_the_run():
    ramp = Ramp(start=0.0, end=1.0)
    assert [at(ramp, step=step, steps=11) for step in (1, 6, 11)] == [0.0, 0.5, 1.0]
    assert at(ramp, step=1, steps=1) == 0.0
