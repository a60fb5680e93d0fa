"""Each on-policy preset against its paper's equation, written out token by token and outcome by outcome.

`q` is the student's distribution at a token, as scalars with gradient; Q the same numbers without, P the teacher's and
R the reference's, so that what a paper detaches is a plain float here. A paper's −A log q is written −A q/Q: the same
gradient, and a value that does not depend on how likely the token was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.facts import Facts
from learner.rewards import pass_rate_weights, pass_rates
from potstill.algebra.objective import Objective, lay_over
from potstill.methods.onpolicy import ON_POLICY
from tests.golden import distribution, evaluate, make_facts

LENGTHS = (3, 1, 2)
TOKENS = range(6)
OUTCOMES = range(7)
WRITTEN = [0, 3, 1, 6, 2, 2]
TOKEN_MEAN = [1 / 6] * 6
SEQUENCE_MEAN = [1 / 9] * 3 + [1 / 3] + [1 / 6] * 2
SEQUENCE_SUM = [1 / 3] * 6

_random = torch.Generator().manual_seed(7)
STUDENT, TEACHER, REFERENCE = (torch.randn(6, 7, generator=_random, dtype=torch.float64) for _ in range(3))
TEACHER = TEACHER * torch.tensor([1.0, 4.0, 1.5, 2.0, 4.0, 1.0], dtype=torch.float64).unsqueeze(-1)  # sure and unsure
LOG_RATIO = [
    2.0,
    -1.0,
    -1.0,
    0.05,
    0.6,
    0.6,
]  # log q/μ: beyond every bound, on the side that PPO clips and on the other
RATIO = [math.exp(x) for x in LOG_RATIO]

Distribution = Sequence[Any]


def softmax(logits: Distribution) -> list[Any]:
    raised = [torch.exp(z) for z in logits]
    return [x / sum(raised) for x in raised]


def floats(logits: Tensor) -> list[list[float]]:
    return [[x.item() for x in softmax(row)] for row in logits]


Q, P, R = floats(STUDENT), floats(TEACHER), floats(REFERENCE)


def log(x: Any) -> Any:
    return torch.log(x) if isinstance(x, Tensor) else math.log(x)


def kl(a: Distribution, b: Distribution) -> Any:
    return sum(x * (log(x) - log(y)) for x, y in zip(a, b, strict=True))


def entropy(a: Distribution) -> Any:
    return -sum(x * log(x) for x in a)


def top(a: Sequence[float], k: int) -> list[int]:
    return sorted(OUTCOMES, key=lambda v: -a[v])[:k]


def advantage(t: int) -> float:
    return math.log(P[t][WRITTEN[t]]) - math.log(Q[t][WRITTEN[t]])


def pushed(q: Distribution, t: int, advantage: float) -> Any:
    """−A log q of the written token: see the module."""
    return -advantage * q[WRITTEN[t]] / Q[t][WRITTEN[t]]


def preset(name: str, **changes: Any) -> Objective:
    """The preset itself, or with what does not fit on 7 outcomes made smaller."""
    return Objective.model_validate(lay_over(ON_POLICY[name].objective.model_dump(), changes))


def behaviour() -> Tensor:
    return torch.tensor([math.log(Q[t][WRITTEN[t]]) - LOG_RATIO[t] for t in TOKENS], dtype=torch.float64)


def inside(**fields: Any) -> Facts:
    """A teacher in the learner."""
    return make_facts(LENGTHS, token_ids=WRITTEN, behaviour=behaviour(), **distribution(TEACHER), **fields)


def server(k: int = 1, **fields: Any) -> Facts:
    """A teacher behind HTTP: the written token, its entropy, its own top-k and the student's, log of the rest."""
    tensors: dict[str, Any] = {
        "teacher": [math.log(P[t][WRITTEN[t]]) for t in TOKENS],
        "teacher_entropy": [entropy(P[t]) for t in TOKENS],
    }
    for ids, kept, rest, chosen_by in (
        ("support_ids", "teacher_support", "teacher_rest", Q),
        ("topk_ids", "teacher_topk", "topk_rest", P),
    ):
        chosen = [top(chosen_by[t], k) for t in TOKENS]
        tensors[ids] = chosen
        tensors[kept] = [[math.log(P[t][v]) for v in chosen[t]] for t in TOKENS]
        tensors[rest] = [math.log(sum(P[t][v] for v in OUTCOMES if v not in chosen[t])) for t in TOKENS]
    found = {
        name: torch.tensor(x, dtype=torch.int64 if name.endswith("ids") else torch.float64)
        for name, x in tensors.items()
    }
    return make_facts(LENGTHS, token_ids=WRITTEN, **{"behaviour": behaviour(), **found, **fields})


def check_paper(
    objective: Objective,
    facts: Facts,
    token_loss: Callable[[Distribution, int], Any],
    weights: Sequence[float],
    *,
    step: int = 1,
) -> None:
    """Loss and gradient are those of Σ weight · token_loss."""
    z = STUDENT.clone().requires_grad_()
    expected = sum(weights[t] * token_loss(softmax(z[t]), t) for t in TOKENS)
    loss, gradient, _ = evaluate(objective, STUDENT, facts, step=step)
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("facts", [inside(), server(k=3)], ids=["inside", "server"])
@pytest.mark.parametrize(("name", "seen"), [("opd", 3), ("early_stop", 2)])
def test_opd_is_a_reverse_kl_with_the_rest_as_one_outcome_and_early_stop_its_beginning(
    name: str, seen: int, facts: Facts
):
    def reverse_kl(q: Distribution, t: int) -> Any:
        kept = top(Q[t], 3)
        own, others = [q[v] for v in kept], [P[t][v] for v in kept]
        return kl([*own, 1 - sum(own)], [*others, 1 - sum(others)])

    gates = [gate.model_dump() | {"last": 2} for gate in ON_POLICY[name].objective.gates]
    weights = [1 / 6 if position < seen else 0.0 for position in (0, 1, 2, 0, 0, 1)]
    check_paper(preset(name, support={"k": 3}, gates=gates), facts, reverse_kl, weights)


def test_opd_full_is_the_reverse_kl():
    check_paper(preset("opd_full"), inside(), lambda q, t: kl(q, P[t]), TOKEN_MEAN)


@pytest.mark.parametrize("facts", [inside(), server()], ids=["inside", "server"])
@pytest.mark.parametrize("name", ["opd_sampled", "g_opd"])
def test_opd_sampled_and_g_opd_at_lambda_1_weigh_the_log_ratio_with_a_truncated_ratio(name: str, facts: Facts):
    assert any(ratio > 5 for ratio in RATIO)
    check_paper(preset(name), facts, lambda q, t: min(RATIO[t], 5.0) * pushed(q, t, advantage(t)), TOKEN_MEAN)


def test_exopd_goes_a_quarter_past_the_teacher():
    def extrapolated(q: Distribution, t: int) -> Any:
        own, other, start = (math.log(x[t][WRITTEN[t]]) for x in (Q, P, R))
        return min(RATIO[t], 5.0) * pushed(q, t, -((own - start) - 1.25 * (other - start)))

    facts = inside(reference_logits=lambda rows: REFERENCE[rows])
    check_paper(preset("exopd"), facts, extrapolated, TOKEN_MEAN)


def test_thinking_machines_scores_with_the_samplers_log_probs_and_sums_over_tokens():
    def cookbook(q: Distribution, t: int) -> Any:
        sampler = Q[t][WRITTEN[t]] / RATIO[t]
        return -(q[WRITTEN[t]] / sampler) * (math.log(P[t][WRITTEN[t]]) - math.log(sampler))

    check_paper(preset("thinking_machines"), server(), cookbook, SEQUENCE_SUM)


@pytest.mark.parametrize("facts", [inside(), server(k=3)], ids=["inside", "server"])
def test_eopd_adds_a_forward_kl_where_the_teacher_is_unsure_to_ppos_clipped_loss(facts: Facts):
    unsure = [entropy(P[t]) > 0.8 for t in TOKENS]
    left = [RATIO[t] > 1.2 if advantage(t) > 0 else RATIO[t] < 0.8 for t in TOKENS]
    assert 0 < sum(unsure) < 6
    assert {advantage(t) > 0 for t in TOKENS if left[t]} == {True, False}

    def eopd(q: Distribution, t: int) -> Any:
        ratio = q[WRITTEN[t]] / Q[t][WRITTEN[t]] * RATIO[t]
        policy = -torch.minimum(ratio * advantage(t), ratio.clamp(0.8, 1.2) * advantage(t))
        if left[t]:  # its value there is a constant, which the learner leaves out
            policy = policy - policy.detach()
        cover = sum(P[t][v] * (math.log(P[t][v]) - log(q[v])) for v in top(P[t], 3)) if unsure[t] else 0.0
        return policy + cover

    objective = preset("eopd", auxiliaries={"cover": {"support": {"k": 3}}})
    check_paper(objective, facts, eopd, TOKEN_MEAN)


@pytest.mark.parametrize("facts", [inside(), server(k=3)], ids=["inside", "server"])
def test_lsm_scales_both_sides_to_1_on_the_teachers_top_k(facts: Facts):
    def lsm(q: Distribution, t: int) -> Any:
        kept = top(P[t], 3)
        own, others = [q[v] for v in kept], [P[t][v] for v in kept]
        return kl([x / sum(own) for x in own], [x / sum(others) for x in others])

    check_paper(preset("lsm", support={"k": 3}), facts, lsm, TOKEN_MEAN)


def test_vopd_adds_the_kl_to_the_advantage():
    check_paper(preset("vopd"), inside(), lambda q, t: pushed(q, t, advantage(t) + kl(Q[t], P[t])), TOKEN_MEAN)


def test_power_opd_scores_with_the_difference_of_fifth_powers():
    check_paper(
        preset("power_opd"),
        server(),
        lambda q, t: pushed(q, t, P[t][WRITTEN[t]] ** 5 - Q[t][WRITTEN[t]] ** 5),
        TOKEN_MEAN,
    )


@pytest.mark.parametrize("facts", [inside(), server()], ids=["inside", "server"])
def test_iw_opd_weighs_a_token_by_how_much_of_its_completions_advantage_is_still_to_come(facts: Facts):
    def early(t: int) -> float:
        completion = next(c for c in ([0, 1, 2], [3], [4, 5]) if t in c)
        passed = sum(abs(advantage(u)) for u in completion if u <= t)
        return 1 + 0.5 * (1 - passed / sum(abs(advantage(u)) for u in completion))

    check_paper(preset("iw_opd"), facts, lambda q, t: early(t) * pushed(q, t, advantage(t)), TOKEN_MEAN)


def test_stable_opd_adds_the_likelihood_of_gold_text_and_a_kl_to_the_reference():
    gold = [0, 1, 2, 3]  # two texts of 3 tokens and 1; the student's own has 2

    def stable(q: Distribution, t: int) -> Any:
        if t in gold:
            return -0.1 * log(q[WRITTEN[t]]) / 4
        return (min(RATIO[t], 5.0) * pushed(q, t, advantage(t)) + 0.01 * kl(q, R[t])) / 2

    known = server()
    nowhere = torch.tensor([t in gold for t in TOKENS])  # nobody scored the gold text, and nobody sampled it
    facts = server(
        origins=["others", "others", "student"],
        teacher=known.teacher.masked_fill(nowhere, torch.nan),
        behaviour=known.behaviour.masked_fill(nowhere, torch.nan),
        reference_logits=lambda rows: REFERENCE[rows],
    )
    check_paper(preset("stable_opd"), facts, stable, [1.0] * 6)


def test_stable_opd_averages_what_the_student_wrote_over_its_tokens():
    def stable(q: Distribution, t: int) -> Any:
        return min(RATIO[t], 5.0) * pushed(q, t, advantage(t)) + 0.01 * kl(q, R[t])

    check_paper(preset("stable_opd"), server(reference_logits=lambda rows: REFERENCE[rows]), stable, TOKEN_MEAN)


@pytest.mark.parametrize(("opener", "forking", "chosen"), [(0.1, 0.1, (3, 3)), (0.5, 0.4, (4, 4))])
def test_tsd_kd_is_a_gated_jsd_a_ranking_of_the_opening_and_entropy_at_the_least_sure_tokens(
    opener: float, forking: float, chosen: tuple[int, int]
):
    entropies = [entropy(Q[t]) for t in TOKENS]
    opening, forks = set(), set()
    for completion in ([0, 1, 2], [3], [4, 5]):
        held = 0.0
        for t in completion:
            opening.add(t)
            held += entropies[t]
            if held >= opener * sum(entropies[u] for u in completion):
                break
        forks |= set(sorted(completion, key=lambda t: -entropies[t])[: math.ceil(forking * len(completion))])
    assert (len(opening), len(forks)) == chosen

    def tsd_kd(q: Distribution, t: int) -> Any:
        middle = [0.9 * p + 0.1 * x for p, x in zip(P[t], q, strict=True)]
        gate = 1 / (1 + math.exp(-(entropies[t] - entropy(P[t]))))
        total = gate * (0.9 * kl(P[t], middle) + 0.1 * kl(q, middle))
        if t in opening:
            ranked = sorted(top(Q[t], 3), key=lambda v: -P[t][v])
            for rank in range(3):
                total = total + 0.1 * (log(sum(q[v] for v in ranked[rank:])) - log(q[ranked[rank]]))
        return total + (entropy(q) if t in forks else 0.0)

    terms = ON_POLICY["tsd_kd"].objective.auxiliaries
    ranking, certainty = (
        [gate.model_dump() | {"share": share} for gate in terms[name].gates]
        for name, share in (("ranking", opener), ("certainty", forking))
    )
    smaller = {"ranking": {"support": {"k": 3}, "gates": ranking}, "certainty": {"gates": certainty}}
    objective = preset("tsd_kd", auxiliaries=smaller)
    check_paper(objective, inside(), tsd_kd, TOKEN_MEAN)


def test_async_opd_averages_corrected_draws_under_the_current_student():
    draws = torch.randint(7, (6, 4), generator=torch.Generator().manual_seed(1))
    sampler = 0.2 * torch.rand(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def async_opd(q: Distribution, t: int) -> Any:
        found = [(int(v), float(mu)) for v, mu in zip(draws[t], sampler[t], strict=True)]
        return sum(-(q[v] / mu) * (math.log(P[t][v]) - math.log(Q[t][v])) for v, mu in found) / 4

    facts = server(
        sample_ids=draws,
        sample_behaviour=sampler.log(),
        sample_teacher=torch.tensor(P, dtype=torch.float64).log().gather(-1, draws),
    )
    check_paper(preset("async_opd", support={"m": 4}), facts, async_opd, TOKEN_MEAN)


def paced_facts(origins: Sequence[str]) -> Facts:
    """Of prompts a, b and a; each stage reads one text of either. a was solved once of two times, b both times."""
    rates = pass_rates(torch.tensor([1.0, 0.0, 1.0, 1.0]), ["a", "a", "b", "b"], smoothing=1)
    a, b = pass_rate_weights(rates[[0, 2]], a=1, b=1).tolist()
    return inside(origins=origins, pass_rate_weight=torch.tensor([a, a, a, b, a, a], dtype=torch.float64))


def pace(t: int) -> float:
    """p(1 − p) of the prompt's smoothed rate, over its mean of the two prompts."""
    a, b = 2 / 4 * (1 - 2 / 4), 3 / 4 * (1 - 3 / 4)
    return (b if t == 3 else a) / ((a + b) / 2)


@pytest.mark.parametrize("name", ["paced", "paced_two_stage"])
def test_paced_weighs_prompts_by_their_pass_rate_and_covers_the_text_of_others(name: str):
    facts = paced_facts(["others", "others", "student"])
    weights = [1 / 6] * 3 + [1 / 2] + [0.0] * 2
    check_paper(preset(name), facts, lambda q, t: pace(t) * kl(P[t], q), weights, step=100)


def test_the_second_stage_of_paced_is_a_reverse_kl_on_the_students_text():
    facts = paced_facts(["others", "student", "student"])
    weights = [0.0] * 3 + [1 / 2] + [1 / 4] * 2
    check_paper(preset("paced_two_stage"), facts, lambda q, t: pace(t) * kl(q, P[t]), weights, step=101)


def test_veto_is_a_forward_kl_to_a_bridge_that_the_student_bends_its_own_way():
    def veto(q: Distribution, t: int) -> Any:
        bridge = [p * x**0.5 for p, x in zip(P[t], Q[t], strict=True)]
        return kl([x / sum(bridge) for x in bridge], q)

    check_paper(preset("veto"), inside(), veto, TOKEN_MEAN)


def test_veto_ends_at_a_power_of_the_teacher():
    _, gradient, _ = evaluate(preset("veto"), TEACHER / (1 - 0.5), inside())
    assert gradient.abs().max() < 1e-15


def test_sequence_mean_gives_each_completion_the_same_weight():
    check_paper(preset("opd_full", aggregation="sequence_mean"), inside(), lambda q, t: kl(q, P[t]), SEQUENCE_MEAN)
