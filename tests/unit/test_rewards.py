"""Rewards of groups by slow loops, and the weights of PACED at the points where they are known."""

from __future__ import annotations

import doctest
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner import rewards as module
from learner.rewards import centred, pass_rate_weights, pass_rates, penalised

judged = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4).map(lambda n: n / 4)), min_size=1, max_size=12)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None)
@given(judged)
def test_a_reward_is_centred_and_its_deviation_taken_within_its_group(step: list[tuple[str, float]]) -> None:
    groups = [group for group, _ in step]
    advantages, deviations = centred(f64(*(reward for _, reward in step)), groups)
    for (group, reward), advantage, deviation in zip(step, advantages.tolist(), deviations.tolist(), strict=True):
        members = [other for name, other in step if name == group]
        assert advantage == pytest.approx(reward - statistics.fmean(members), abs=1e-12)
        assert deviation == pytest.approx(statistics.pstdev(members), abs=1e-12)


@settings(deadline=None)
@given(judged, st.floats(-100, 100))
def test_a_constant_added_to_all_rewards_changes_nothing(step: list[tuple[str, float]], shift: float) -> None:
    groups, rewards = [group for group, _ in step], f64(*(reward for _, reward in step))
    for before, after in zip(centred(rewards, groups), centred(rewards + shift, groups), strict=True):
        torch.testing.assert_close(before, after, atol=1e-7, rtol=0)


def test_equal_rewards_in_single_precision_have_exactly_no_advantage() -> None:
    advantages, deviation = centred(torch.tensor([0.1, 0.1, 0.1]), ["a"] * 3)
    assert advantages.tolist() == [0, 0, 0]
    assert deviation.tolist() == [0, 0, 0]


def test_a_group_of_one_has_no_advantage_and_no_nan() -> None:
    advantages, deviation = centred(f64(0.7), ["a"])
    assert (advantages.item(), deviation.item()) == (0, 0)


@pytest.mark.parametrize("unjudged", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_missing_is_refused_by_name(unjudged: float) -> None:
    for read in (centred, lambda rewards, groups: pass_rates(rewards, groups, smoothing=1)):
        with pytest.raises(ValueError, match=rf"completion 1 of prompt 'train-7' has reward {unjudged}; was it judged"):
            read(f64(1, unjudged), ["train-2", "train-7"])


def test_rewards_and_groups_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        centred(f64(1, 0), ["a"])


def test_a_pass_rate_counts_full_marks_of_the_prompt() -> None:
    found = pass_rates(f64(1, 0.9, 0, 1, 1), ["a", "a", "a", "a", "b"], smoothing=0)
    assert found.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]


def test_smoothing_of_one_is_the_rule_of_laplace() -> None:
    found = pass_rates(f64(0, 0, 0, 1), ["a", "a", "a", "b"], smoothing=1)
    torch.testing.assert_close(found, f64(1 / 5, 1 / 5, 1 / 5, 2 / 3))


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 1), (1, 3), (0.5, 2)])
def test_the_weight_of_a_pass_rate_peaks_at_a_over_a_plus_b(a: float, b: float) -> None:
    rates = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    found = pass_rate_weights(rates, a=a, b=b)
    assert rates[found.argmax()].item() == pytest.approx(a / (a + b), abs=1e-4)
    assert (found[0].item(), found[-1].item()) == (0, 0)


def test_the_weight_of_a_pass_rate_is_symmetric_where_a_is_b() -> None:
    found = pass_rate_weights(f64(0.1, 0.3, 0.7, 0.9), a=2, b=2)
    torch.testing.assert_close(found, found.flip(0))


def test_smoothing_leaves_prompts_that_always_fail_or_succeed_some_weight() -> None:
    rewards, groups = f64(0, 0, 1, 1, 1, 0), ["fails", "fails", "passes", "passes", "half", "half"]
    raw = pass_rate_weights(pass_rates(rewards, groups, smoothing=0), a=1, b=1)
    smooth = pass_rate_weights(pass_rates(rewards, groups, smoothing=1), a=1, b=1)
    assert raw.tolist() == [0, 0, 0, 0, 3, 3]
    assert 0 < smooth[0] < smooth[4]
    assert smooth[0] == smooth[2]


def test_exponents_of_zero_leave_all_prompts_alike() -> None:
    assert pass_rate_weights(f64(0, 0.2, 1), a=0, b=0).tolist() == [1, 1, 1]


@settings(deadline=None)
@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=9),
    st.floats(0, 4),
    st.floats(0, 4),
)
def test_weights_of_pass_rates_have_mean_one_over_the_step(rates: list[float], a: float, b: float) -> None:
    assert pass_rate_weights(f64(*rates), a=a, b=b).mean().item() == pytest.approx(1, rel=1e-12)


def test_a_step_in_which_nothing_has_weight_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r'gate "pass_rate" leaves nothing .* Set its smoothing to 1'):
        pass_rate_weights(f64(0, 1, 0), a=1, b=1)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_pass_rate_outside_the_unit_interval_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="pass rates lie in"):
        pass_rate_weights(f64(0.5, rate), a=1, b=1)


def test_a_penalty_is_the_mean_over_the_completion_of_how_far_the_sampler_strayed() -> None:
    student = [f64(-1, -2, -3), f64(-1)]
    teacher = [f64(-2, -4, -6), f64(-0.5)]
    found = penalised(f64(1, 0), student, teacher, kl_penalty=0.25)
    assert found.tolist() == [1 - 0.25 * 2, 0 + 0.25 * 0.5]


def test_a_sampler_that_strays_further_loses_reward() -> None:
    near, far = (penalised(f64(1), [f64(lp)], [f64(-2)], kl_penalty=0.5).item() for lp in (-1.5, -0.5))
    assert far < near < 1


def test_a_penalty_of_zero_leaves_the_rewards() -> None:
    assert penalised(f64(1, 0), [f64(-1), f64(-3)], [f64(-9), f64(-2)], kl_penalty=0).tolist() == [1, 0]


@pytest.mark.parametrize("student", [f64(-1, math.nan), f64()])
def test_a_completion_without_scores_is_refused_by_name(student: Tensor) -> None:
    with pytest.raises(ValueError, match="completion 1 has reward nan after its KL penalty"):
        penalised(f64(1, 1), [f64(-1), student], [f64(-1), torch.zeros_like(student)], kl_penalty=0.1)


def test_the_examples_in_the_docstrings_are_true() -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
