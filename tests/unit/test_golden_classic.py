"""White-box presets against their papers, token by token and outcome by outcome. Nothing here calls learner's formulas.

Completions of 2, 1, 3 and 2 tokens, 7 tokens in the vocabulary. z student's logits, q its probabilities, p the
teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.schedules import Schedules
from potstill.algebra.objective import Objective, lay_over
from potstill.methods.classic import CLASSIC
from tests.golden import distribution, evaluate, make_facts

LENGTHS, V = (2, 1, 3, 2), 7
N = sum(LENGTHS)
IDS = (2, 0, 5, 6, 1, 1, 4, 3)
FIRST_TWO_OTHERS = ("others", "others", "student", "student")
OTHERS = ("others",) * 4
EXACT = {"rtol": 1e-9, "atol": 1e-13}

Row = Sequence[Tensor]  # one number an outcome


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = 1.5 * random(1, N, V), 1.5 * random(2, N, V)


def check_paper(
    name: str,
    literal: Callable[[Tensor], Tensor],
    *,
    changes: Mapping[str, Any] | None = None,
    origins: Sequence[str] | None = None,
    step: int = 1,
    schedule: Mapping[str, float] | None = None,
    **fields: Any,
) -> None:
    """The preset's loss and gradient are those of the formula. `literal` maps logits [N, V] to the loss."""
    objective = preset(name, changes or {})
    facts = make_facts(LENGTHS, token_ids=IDS, origins=origins, **(fields or distribution(TEACHER)))
    loss, gradient, _ = evaluate(objective, STUDENT, facts, step=step, schedule=schedule)
    z = STUDENT.clone().requires_grad_()
    expected = literal(z)
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], **EXACT)


def preset(name: str, changes: Mapping[str, Any]) -> Objective:
    return Objective(**lay_over(CLASSIC[name].objective.model_dump(), changes))


def softmax(logits: Row) -> list[Tensor]:
    total = sum(x.exp() for x in logits)
    return [x.exp() / total for x in logits]


def constant_softmax(logits: Row) -> list[Tensor]:
    return [x.detach() for x in softmax(logits)]


def kl(a: Row, b: Row) -> Tensor:
    return sum(x * (x / y).log() for x, y in zip(a, b, strict=True) if x > 0)


def entropy(a: Row) -> Tensor:
    return -sum(x * x.log() for x in a)


def mixture(share: float, a: Row, b: Row) -> list[Tensor]:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def completions() -> list[range]:
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [range(start, start + length) for start, length in zip(starts, LENGTHS, strict=True)]


def mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values) / len(values)


def mean_over_tokens(loss: Callable[[int], Tensor]) -> Tensor:
    return mean([loss(n) for n in range(N)])


def mean_of_means(loss: Callable[[int], Tensor], among: Sequence[range]) -> Tensor:
    return mean([mean([loss(n) for n in rows]) for rows in among])


def p(n: int) -> list[Tensor]:
    return softmax(TEACHER[n])


def generalised_jsd(z: Row, p: Row, beta: float) -> Tensor:
    q = softmax(z)
    m = mixture(beta, p, q)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gkd_is_the_mean_over_completions_of_each_ones_mean_jsd(beta: float) -> None:
    check_paper(
        "gkd",
        lambda z: mean_of_means(lambda n: generalised_jsd(z[n], p(n), beta), completions()),
        changes={"loss": {"beta": beta}},
    )


@pytest.mark.parametrize(
    ("beta", "divergence"),
    [(0.0, lambda z, p: kl(p, softmax(z))), (1.0, lambda z, p: kl(softmax(z), p))],
    ids=["forward_kl", "reverse_kl"],
)
def test_gkd_at_the_ends_of_beta_is_a_kl(beta: float, divergence: Callable[[Row, Row], Tensor]) -> None:
    check_paper(
        "gkd",
        lambda z: mean_of_means(lambda n: divergence(z[n], p(n)), completions()),
        changes={"loss": {"beta": beta}},
    )


def test_gkd_topk_is_the_jsd_over_what_the_teacher_sent_and_one_outcome_for_the_rest() -> None:
    k = 3
    top = [sorted(range(V), key=lambda v: -TEACHER[n, v])[:k] for n in range(N)]

    def outcomes(probabilities: Row, n: int) -> list[Tensor]:
        kept = [probabilities[v] for v in top[n]]
        return [*kept, sum(probabilities[v] for v in range(V) if v not in top[n])]

    def loss(z: Tensor, n: int) -> Tensor:
        q, t = outcomes(softmax(z[n]), n), outcomes(p(n), n)
        m = mixture(0.5, t, q)
        return 0.5 * kl(t, m) + 0.5 * kl(q, m)

    sent = torch.tensor([[float(x) for x in outcomes(p(n), n)] for n in range(N)], dtype=torch.float64).log()
    check_paper(
        "gkd_topk",
        lambda z: mean_of_means(lambda n: loss(z, n), completions()),
        changes={"support": {"k": k}},
        topk_ids=torch.tensor(top),
        teacher_topk=sent[:, :k],
        topk_rest=sent[:, k],
    )


def test_minillm_weighs_the_exact_term_and_the_return_of_what_follows_by_the_tokens_ratio() -> None:
    """∇L = −E_{y∼p̃} Σ_t w_t [∇ Σ_v q_v log(p_v/q_v) + R_{t+1} ∇ log q_t] + ½ ∇L_PT, p̃ = 0.2 p + 0.8 q, w = q/p̃,
    R_{t+1} = (1/(T − t − 1)) Σ_{t'>t} log p/q of the tokens after t.
    """
    own, data = completions()[::2], completions()[1::2]
    sampler = torch.stack([(0.2 * p(n)[IDS[n]] + 0.8 * softmax(STUDENT[n])[IDS[n]]).log() for n in range(N)])

    def sequence(z: Tensor, rows: range) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n in rows:
            q, written = softmax(z[n]), IDS[n]
            weight = (q[written] / sampler[n].exp()).detach()
            later = [(p(m)[IDS[m]] / softmax(z[m])[IDS[m]]).log().detach() for m in rows if m > n]
            ret = sum(later) / len(later) if later else 0.0
            total = total + weight * kl(q, p(n)) - weight * ret * q[written] / q[written].detach()
        return total

    def literal(z: Tensor) -> Tensor:
        pretraining = mean([-sum(softmax(z[n])[IDS[n]].log() for n in rows) for rows in data])
        return mean([sequence(z, rows) for rows in own]) + 0.5 * pretraining

    origins = ("student", "others", "student", "others")
    check_paper("minillm", literal, origins=origins, behaviour=sampler, **distribution(TEACHER))


def test_distillm_is_the_kl_of_the_student_to_its_skewed_mixture_with_the_teacher() -> None:
    def loss(z: Tensor, n: int) -> Tensor:
        q = softmax(z[n])
        return kl(q, mixture(0.9, p(n), q))

    check_paper("distillm", lambda z: mean_over_tokens(lambda n: loss(z, n)))


def test_distillm_forward_is_the_kl_of_the_teacher_to_the_mixture() -> None:
    check_paper(
        "distillm_forward",
        lambda z: mean_over_tokens(lambda n: kl(p(n), mixture(0.1, p(n), softmax(z[n])))),
    )


def test_distillm2_gives_each_half_of_the_text_its_own_divergence() -> None:
    """½ [mean over others of SKL_0.1 + mean over the student's of SRKL_0.1], with the gradient through the mixture."""

    def literal(z: Tensor) -> Tensor:
        def forward(n: int) -> Tensor:
            return kl(p(n), mixture(0.1, p(n), softmax(z[n])))

        def reverse(n: int) -> Tensor:
            q = softmax(z[n])
            return kl(q, mixture(0.9, p(n), q))

        theirs, own = completions()[:2], completions()[2:]
        return 0.5 * (mean_of_means(forward, theirs) + mean_of_means(reverse, own))

    check_paper("distillm2", literal, origins=FIRST_TWO_OTHERS)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_taid_is_the_kl_from_a_constant_target_between_both_logits(t: float) -> None:
    def loss(z: Tensor, n: int) -> Tensor:
        target = constant_softmax([(1 - t) * own + t * other for own, other in zip(z[n], TEACHER[n], strict=True)])
        return kl(target, softmax(z[n]))

    check_paper("taid", lambda z: mean_over_tokens(lambda n: loss(z, n)), schedule={"main": t})


@pytest.mark.parametrize("steps", [5, 20_000])  # the straight line to 1 rules; it hardly rises
def test_taid_moves_t_as_its_algorithm_does(steps: int) -> None:
    losses = [2.0, 1.9, 1.2, 1.3, 1.1]
    schedules = Schedules(preset("taid", {}), steps)
    t, m, previous = 0.4, 0.0, None
    for n, loss in enumerate(losses, start=1):
        if previous is not None:
            fall = (previous - loss) / (previous + 1e-15)
            m = 0.99 * m + 0.01 * fall
            t = min(1.0, max(0.4 + 0.6 * n / steps, t + 5e-4 / (1 + math.exp(-m)) * (1 - t)))
        previous = loss
        schedules.observe(n, {"main": loss})
        assert schedules.values()["main"] == pytest.approx(t, rel=1e-12)


def test_bd_kd_leans_on_the_reverse_kl_where_the_student_is_less_sure() -> None:
    def loss(z: Tensor, n: int) -> Tensor:
        q = softmax(z[n])
        g = 1 / (1 + (-(entropy(q) - entropy(p(n)))).exp()).detach()
        return g * kl(q, p(n)) + (1 - g) * kl(p(n), q)

    check_paper("bd_kd", lambda z: mean_over_tokens(lambda n: loss(z, n)))


def test_logit_standardised_compares_z_scores_at_temperature_two_times_four() -> None:
    def standardised(z: Row) -> list[Tensor]:
        centre = mean(list(z))
        deviation = mean([(x - centre) ** 2 for x in z]).sqrt()
        return softmax([(x - centre) / deviation / 2 for x in z])

    check_paper(
        "logit_standardised",
        lambda z: mean_over_tokens(lambda n: 4 * kl(standardised(TEACHER[n]), standardised(z[n]))),
    )


def test_pld_ranks_the_written_token_first_and_the_others_as_the_teacher_does() -> None:
    """Σ_k p_{π(k)} [log Σ_{l ≥ k} exp z_{π(l)} − z_{π(k)}]."""

    def loss(z: Tensor, n: int) -> Tensor:
        others = sorted((v for v in range(V) if v != IDS[n]), key=lambda v: -TEACHER[n, v])
        order = [IDS[n], *others]
        return sum(
            p(n)[v] * (sum(z[n, later].exp() for later in order[rank:]).log() - z[n, v]) for rank, v in enumerate(order)
        )

    assert any(IDS[n] != int(TEACHER[n].argmax()) for n in range(N))
    check_paper("pld", lambda z: mean_over_tokens(lambda n: loss(z, n)), origins=OTHERS)


@pytest.mark.parametrize(("step", "share"), [(1, 0.0), (3, 0.4), (5, 0.8), (9, 0.8)])
def test_ps_kd_mixes_the_written_token_with_earlier_predictions_more_and_more(step: int, share: float) -> None:
    def loss(z: Tensor, n: int) -> Tensor:
        target = [(1 - share) * float(v == IDS[n]) + share * p(n)[v] for v in range(V)]
        return kl([torch.as_tensor(x) for x in target], softmax(z[n]))

    check_paper(
        "ps_kd",
        lambda z: mean_over_tokens(lambda n: loss(z, n)),
        changes={"target": {"share": {"to_step": 5}}},
        origins=OTHERS,
        step=step,
    )


def test_swing_heats_the_teacher_by_how_private_a_token_is() -> None:
    privacy = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.0, 0.75, 0.1, 0.9], dtype=torch.float64)

    def loss(z: Tensor, n: int) -> Tensor:
        temperature = 1 + (4 - 1) * float(privacy[n])
        return kl(softmax([x / temperature for x in TEACHER[n]]), softmax(z[n]))

    check_paper("swing", lambda z: mean_over_tokens(lambda n: loss(z, n)), privacy=privacy, **distribution(TEACHER))


@pytest.mark.parametrize("name", ["dac_kl", "dac_kl_scrg"])
def test_dac_kl_drops_what_is_outside_the_teachers_nucleus_on_both_sides(name: str) -> None:
    def kept(n: int) -> list[int]:
        held, ids = 0.0, []
        for v in sorted(range(V), key=lambda v: -TEACHER[n, v]):
            ids.append(v)
            held += float(p(n)[v])
            if held >= 0.95:
                break
        return ids

    def loss(z: Tensor, n: int) -> Tensor:
        return kl(softmax([TEACHER[n, v] for v in kept(n)]), softmax([z[n, v] for v in kept(n)]))

    assert len({len(kept(n)) for n in range(N)}) > 1
    check_paper(name, lambda z: mean_over_tokens(lambda n: loss(z, n)))


def test_first_calibrates_the_teachers_top_and_compares_it_with_the_students_share_of_it() -> None:
    k, temperature = 4, 1.7

    def loss(z: Tensor, n: int) -> Tensor:
        top = sorted(range(V), key=lambda v: -TEACHER[n, v])[:k]
        calibrated = [p(n)[v] ** (1 / temperature) for v in top]
        total = sum(calibrated)
        return kl([x / total for x in calibrated], softmax([z[n, v] for v in top]))

    check_paper(
        "first",
        lambda z: mean_over_tokens(lambda n: loss(z, n)),
        changes={"support": {"k": k}, "target": {"teacher": temperature}},
    )


def token_at(threshold: float, weights: Mapping[int, float]) -> int:
    """The token in whose stretch of the line the threshold falls, tokens laid out in the order of their ids."""
    passed = 0.0
    for v in sorted(weights):
        passed += weights[v]
        if threshold < passed:
            return v
    raise AssertionError("no threshold exceeds the sum of all")


@pytest.mark.parametrize(
    ("name", "head", "draws", "changes"),
    [
        ("random_sampling_kd", 0, 50, {}),
        ("random_sampling_hybrid", 2, 9, {"support": {"head": 2, "draws": 9}}),
    ],
)
def test_random_sampling_is_the_kl_from_an_exact_head_and_counted_draws(
    name: str, head: int, draws: int, changes: Mapping[str, Any]
) -> None:
    uniforms = torch.rand(N, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def target(n: int) -> list[Tensor]:
        by_rank = sorted(range(V), key=lambda v: -TEACHER[n, v])
        tail = {v: float(p(n)[v]) for v in by_rank[head:]}
        mass = sum(tail.values())
        weights = [p(n)[v] if v in by_rank[:head] else torch.zeros((), dtype=torch.float64) for v in range(V)]
        for u in uniforms[n].tolist():
            v = token_at(u * mass, tail)
            weights[v] = weights[v] + mass / draws
        return weights

    check_paper(
        name,
        lambda z: mean_over_tokens(lambda n: kl(target(n), softmax(z[n]))),
        changes=changes,
        uniforms=uniforms,
        **distribution(TEACHER),
    )


def test_uld_sorts_both_sides_beside_the_likelihood_of_the_texts_of_others() -> None:
    def shape(z: Tensor, n: int) -> Tensor:
        pairs = zip(sorted(softmax(z[n]), reverse=True), sorted(p(n), reverse=True), strict=True)
        return sum((own - other).abs() for own, other in pairs)

    def literal(z: Tensor) -> Tensor:
        theirs = [n for rows in completions()[:2] for n in rows]
        supervised = mean([-softmax(z[n])[IDS[n]].log() for n in theirs])
        return 1.5 * mean_over_tokens(lambda n: shape(z, n)) + supervised

    check_paper("uld", literal, origins=FIRST_TWO_OTHERS)


def test_every_preset_of_the_file_has_the_numbers_of_its_paper_as_it_stands() -> None:
    """What the tests above change for a small vocabulary."""
    supports = {name: method.objective.support.model_dump() for name, method in CLASSIC.items()}
    assert supports["gkd_topk"] == {"kind": "teacher_topk", "k": 16, "rest": "tail"}
    assert supports["first"] == {"kind": "teacher_topk", "k": 5, "rest": "renorm"}
    assert supports["random_sampling_hybrid"] == {"kind": "random_sampling", "draws": 42, "head": 8}
    assert CLASSIC["gkd"].objective.loss.beta == 0.5
