"""Averages against products written out, routes against a loop, learned weights against the bound of their regret."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from learner.divergences import forward_kl, reverse_kl
from learner.ensemble import Hedge, average_of_logits, average_of_probabilities, routed, teacher_of

WEIGHTS = (0.2, 0.5, 0.3)
both_averages = pytest.mark.parametrize("average", [average_of_logits, average_of_probabilities])


def teachers(*, seed: int = 0, rows: int = 4, vocabulary: int = 5) -> list[Tensor]:
    """Logits [C, V] of three teachers, of different scales and offsets."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(3, rows, vocabulary, dtype=torch.float64, generator=generator)
    return [z[0], 3 * z[1] + 7, z[2] - 2]


# Averages.


def test_the_average_of_logits_is_the_normalised_geometric_mean() -> None:
    for row, found in enumerate(average_of_logits(teachers(), WEIGHTS).exp().tolist()):
        p = [z[row].softmax(-1).tolist() for z in teachers()]
        products = [math.prod(one[v] ** w for one, w in zip(p, WEIGHTS, strict=True)) for v in range(5)]
        assert found == pytest.approx([x / math.fsum(products) for x in products], rel=1e-12)


def test_the_average_of_probabilities_is_the_arithmetic_mean() -> None:
    for row, found in enumerate(average_of_probabilities(teachers(), WEIGHTS).exp().tolist()):
        p = [z[row].softmax(-1).tolist() for z in teachers()]
        sums = [math.fsum(w * one[v] for one, w in zip(p, WEIGHTS, strict=True)) for v in range(5)]
        assert found == pytest.approx(sums, rel=1e-12)


def test_each_average_is_the_minimum_of_one_direction_of_kl_and_not_of_the_other() -> None:
    all_logp = [z.log_softmax(-1) for z in teachers()]

    def slope(at: Tensor, *, reverse: bool) -> float:
        z = at.clone().requires_grad_()
        losses = [
            reverse_kl(z.log_softmax(-1), logp)
            if reverse
            else forward_kl(z.log_softmax(-1), logp, pointwise_clip=None, zero_sum=False)
            for logp in all_logp
        ]
        total = sum(w * loss.sum() for w, loss in zip(WEIGHTS, losses, strict=True))
        return float(torch.autograd.grad(total, z)[0].abs().max())

    geometric, mixture = average_of_logits(teachers(), WEIGHTS), average_of_probabilities(teachers(), WEIGHTS)
    assert slope(geometric, reverse=True) < 1e-14
    assert slope(mixture, reverse=False) < 1e-14
    assert slope(geometric, reverse=False) > 0.01
    assert slope(mixture, reverse=True) > 0.01


def test_the_two_averages_differ() -> None:
    difference = average_of_logits(teachers(), WEIGHTS).exp() - average_of_probabilities(teachers(), WEIGHTS).exp()
    assert difference.abs().max() > 0.01


@both_averages
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.1, 0.9), (1.0, 0.0)])
def test_one_teacher_twice_is_one_teacher(average, weights) -> None:
    z = teachers()[1]
    torch.testing.assert_close(average([z, z], weights), z.log_softmax(-1))


@both_averages
def test_a_teachers_offset_changes_nothing(average) -> None:
    moved = [z + shift for z, shift in zip(teachers(), (5.0, -3.0, 100.0), strict=True)]
    torch.testing.assert_close(average(moved, WEIGHTS), average(teachers(), WEIGHTS))


@both_averages
def test_a_teacher_of_weight_zero_is_not_read(average) -> None:
    first, second, _ = teachers()
    broken = torch.full_like(first, math.nan)
    torch.testing.assert_close(average([first, broken, second], (0.4, 0.0, 0.6)), average([first, second], (0.4, 0.6)))


def test_a_token_impossible_for_one_teacher_is_impossible_in_the_geometric_mean_alone() -> None:
    a, b = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, -torch.inf, -torch.inf]])
    torch.testing.assert_close(average_of_logits([a, b], (0.5, 0.5)).exp(), torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(average_of_probabilities([a, b], (0.5, 0.5)).exp(), torch.tensor([[0.75, 0.25, 0.0]]))


@both_averages
@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (1.2, -0.2, 0.0), (math.nan, 0.5, 0.5), (0.0, 0.0, 0.0), ()])
def test_weights_that_are_not_a_distribution_are_refused_and_never_normalised(average, weights) -> None:
    with pytest.raises(ValueError, match="≥ 0 and sum to 1"):
        average(teachers(), weights)


@both_averages
def test_weights_for_another_number_of_teachers_are_refused(average) -> None:
    with pytest.raises(ValueError, match="3 teachers need as many weights, not 2"):
        average(teachers(), (0.5, 0.5))


# Routes.


class Recorded:
    """A teacher of given logits [N, V] that remembers which rows it was asked for."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.asked: list[list[int]] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.asked.append(rows.tolist())
        return self.logits[rows]


def test_each_row_has_its_own_teachers_logits_in_its_own_place_and_no_other_teacher_is_asked() -> None:
    asked = [Recorded(z) for z in teachers(rows=7)]
    which = torch.tensor([2, 0, 2, 1, 0, 0, 2])
    logits = routed(asked, which)
    for rows in ([0, 1, 2, 3], [6, 1, 4], [5, 1]):
        found = logits(torch.tensor(rows))
        torch.testing.assert_close(found, torch.stack([asked[int(which[r])].logits[r] for r in rows]))
    assert asked[0].asked == [[1], [1, 4], [5, 1]]
    assert asked[1].asked == [[3]]
    assert asked[2].asked == [[0, 2], [6]]


@pytest.mark.parametrize("which", [[0, 3], [-1, 0]])
def test_a_row_for_a_teacher_that_is_not_there_is_refused(which: list[int]) -> None:
    with pytest.raises(ValueError, match="but there are 3"):
        routed([Recorded(z) for z in teachers()], torch.tensor(which))


def test_a_domain_chooses_its_teacher_and_an_unknown_one_is_refused() -> None:
    table = {"maths": 1, "code": 0, "chat": 1}
    assert teacher_of(["code", "chat", "maths", "code"], table).tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="domain 'law'; there are"):
        teacher_of(["code", "law"], table)


# Learned weights.

NAMES = ("a", "b", "c")


def rounds(num: int, *, seed: int) -> list[dict[str, float]]:
    """Losses in [0, 1] at random; the best teacher changes halfway."""
    random_ = random.Random(seed)
    means = ((0.2, 0.5, 0.6), (0.7, 0.5, 0.2))
    return [
        {
            name: min(1.0, max(0.0, random_.gauss(mean, 0.3)))
            for name, mean in zip(NAMES, means[2 * i // num], strict=True)
        }
        for i in range(num)
    ]


def regret(losses: list[dict[str, float]], *, rate: float) -> float:
    """What following the weights costs more than the best single teacher in hindsight."""
    hedge = Hedge(list(losses[0]), rate=rate)
    paid = 0.0
    for one in losses:
        paid += math.fsum(weight * one[name] for name, weight in hedge.weights().items())
        hedge.update(one)
    return paid - min(math.fsum(one[name] for one in losses) for name in losses[0])


def test_weights_are_the_product_of_a_factor_per_round() -> None:
    hedge, factors = Hedge(NAMES, rate=0.7), dict.fromkeys(NAMES, 1.0)
    assert hedge.weights() == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    for one in rounds(40, seed=1):
        hedge.update(one)
        factors = {name: factor * math.exp(-0.7 * one[name]) for name, factor in factors.items()}
        total = math.fsum(factors.values())
        assert hedge.weights() == pytest.approx({name: factor / total for name, factor in factors.items()}, rel=1e-9)


@pytest.mark.parametrize("rate", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("num", [10, 100, 1000])
def test_regret_keeps_its_bound_for_losses_at_random_and_for_an_adversarys(num: int, rate: float) -> None:
    bound = math.log(3) / rate + rate * num / 8
    assert regret(rounds(num, seed=2), rate=rate) <= bound
    hedge, adversary = Hedge(NAMES, rate=rate), []
    for _ in range(num):  # the heaviest teacher fails
        weights = hedge.weights()
        heaviest = max(NAMES, key=weights.__getitem__)
        adversary.append({name: float(name == heaviest) for name in NAMES})
        hedge.update(adversary[-1])
    assert 0 < regret(adversary, rate=rate) <= bound


def test_regret_a_round_falls_where_each_teacher_is_right_on_one_domain() -> None:
    """One choice per domain: two teachers, each failing 80 % of what the other masters."""
    random_ = random.Random(3)
    means = {"maths": {"a": 0.1, "b": 0.8}, "code": {"a": 0.8, "b": 0.1}}
    hedges = {domain: Hedge(["a", "b"], rate=0.2) for domain in means}
    regrets = []
    for _ in range(400):
        domain = random_.choice(sorted(means))
        losses = {name: float(random_.random() < mean) for name, mean in means[domain].items()}
        weights = hedges[domain].weights()
        regrets.append(math.fsum(weights[name] * means[domain][name] for name in weights) - 0.1)
        hedges[domain].update(losses)
    assert regrets[0] == pytest.approx(0.35)
    assert sum(regrets[:100]) > 10 * sum(regrets[300:])
    assert hedges["maths"].weights()["a"] > 0.99
    assert hedges["code"].weights()["b"] > 0.99


def test_ten_thousand_rounds_leave_finite_weights() -> None:
    hedge = Hedge(["good", "bad"], rate=5.0)
    for _ in range(10_000):
        hedge.update({"good": 0.0, "bad": 1.0})
    assert hedge.weights() == {"good": 1.0, "bad": 0.0}


def test_a_run_that_was_resumed_has_the_weights_of_one_that_was_not() -> None:
    whole, first, second = (Hedge(NAMES, rate=0.3) for _ in range(3))
    losses = rounds(30, seed=4)
    for one in losses:
        whole.update(one)
    for one in losses[:11]:
        first.update(one)
    state = first.state()
    first.state()["a"] = 9.0
    assert first.state() == state
    second.load({name: state[name] for name in reversed(NAMES)})
    for one in losses[11:]:
        second.update(one)
    assert list(second.weights().items()) == list(whole.weights().items())
    assert second.state() == whole.state()


@pytest.mark.parametrize("state", [{"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}])
def test_a_state_or_a_round_of_other_teachers_is_refused(state: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="the teachers are"):
        Hedge(NAMES, rate=1.0).load(state)
    with pytest.raises(ValueError, match="the teachers are"):
        Hedge(NAMES, rate=1.0).update(state)


@pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan, math.inf])
def test_a_loss_outside_0_and_1_is_refused_and_changes_nothing(loss: float) -> None:
    hedge = Hedge(NAMES, rate=1.0)
    with pytest.raises(ValueError, match="the loss of teacher 'b' is"):
        hedge.update({"a": 0.5, "b": loss, "c": 0.5})
    assert hedge.state() == dict.fromkeys(NAMES, 0.0)


def test_a_broken_score_a_rate_of_nothing_and_names_that_are_not_distinct_are_refused() -> None:
    with pytest.raises(ValueError, match="the score of teacher 'b' is nan"):
        Hedge(NAMES, rate=1.0).load({"a": 0.0, "b": math.nan, "c": 0.0})
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate is positive"):
            Hedge(NAMES, rate=rate)
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="distinct names"):
            Hedge(names, rate=1.0)
