"""What a step's health is measured by, against numbers by hand."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch

from learner import measures as module
from learner.measures import of_sampler, overlap
from learner.targets import gather
from potstill.methods import PRESETS
from rollout_worker import repetition as repetition_module
from rollout_worker.repetition import TAIL, repetition
from tests.rollouts import make_rollout, make_scored


@pytest.mark.parametrize("documented", [module, repetition_module], ids=["measures", "repetition"])
def test_the_examples_in_the_documentation_hold(documented) -> None:
    found = doctest.testmod(documented)
    assert found.attempted > 0
    assert found.failed == 0


def test_the_estimate_of_a_stale_texts_divergence_is_unbiased_and_never_negative() -> None:
    mu, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    rows = of_sampler(q.log(), mu.log(), torch.tensor([3, 1, 2]))["staleness_kl"]
    assert (rows >= 0).all()
    assert (mu * rows).sum().item() == pytest.approx((mu * (mu / q).log()).sum().item())


def test_a_measure_without_a_row_is_left_out() -> None:
    logq = torch.tensor([0.5]).log()
    assert of_sampler(logq, torch.tensor([math.nan]), torch.tensor([0])) == {}
    assert of_sampler(logq, logq, torch.tensor([-1])) == {}
    assert of_sampler(logq, logq, torch.tensor([0])).keys() == {"sampler_gap"}
    assert of_sampler(logq, logq, torch.tensor([1])).keys() == {"staleness_kl"}


def test_the_overlap_is_one_less_the_total_variation() -> None:
    p, q = torch.tensor([[0.6, 0.3, 0.1]]).double(), torch.tensor([[0.1, 0.3, 0.6]]).double()
    assert overlap(q.log(), p.log()).item() == pytest.approx(1 - (p - q).abs().sum().item() / 2)
    assert overlap(p.log(), p.log()).item() == pytest.approx(1)
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    assert overlap(apart[:1], apart[1:]).item() == 0


def test_the_age_of_a_token_is_in_versions_and_text_of_nobody_has_none() -> None:
    """Step 6 moves the student of version 5."""
    carried_over = make_rollout(versions=[3, 4, 5], student=[-1.0] * 3)
    handed = make_rollout(id="b/0", versions=[5, -1, -1], student=[-1.0, math.nan, math.nan])
    batch = [make_scored(carried_over), make_scored(handed)]
    masks = [np.ones(3, dtype=np.bool_)] * 2
    facts = gather(batch, masks, PRESETS["sft"].objective, device=torch.device("cpu"), step=6, inside=False, rewards={})
    assert facts.age is not None
    assert facts.age.tolist() == [2, 1, 0, 0, -1, -1]


def test_a_loop_is_told_from_prose_by_how_far_it_shrinks() -> None:
    prose = (module.__doc__ or "") + (repetition.__doc__ or "")
    assert 1 < repetition(prose) < 4
    assert repetition("Wait, let me check that again. " * 40) > 10
    assert repetition("") == 0


def test_a_loop_at_the_end_is_not_hidden_by_a_long_beginning() -> None:
    random = np.random.default_rng(0)
    sound = "".join(chr(code) for code in random.integers(33, 126, 5 * TAIL))
    assert repetition(sound) < 2
    assert repetition(sound + "and so on " * (TAIL // 10)) > 100
