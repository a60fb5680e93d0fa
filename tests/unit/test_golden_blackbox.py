"""Methods for a teacher of which only text or an order can be had, against their papers' equations in loops.

GAD's generator is in test_golden_rewarded.py, by which scores it learns in test_discriminator.py; SODA is in
test_golden_offline.py.
"""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from learner.discriminator import Discriminator
from learner.rewards import centred
from potstill import rankings
from potstill.algebra.objective import Objective
from potstill.methods import PRESETS
from potstill.methods.method import objective
from potstill.rankings import from_ranking
from potstill.types import Rollout
from tests.golden import evaluate, make_facts
from tests.presets import Batch, make_batch
from tests.trainers import PLAIN, make_network, make_trainer, take_step

HEAD = "discriminator_head"

# GAD's discriminator: the student with a scalar head at the last token.


def score(network: PreTrainedModel, head: Tensor, rollout: Rollout) -> Tensor:
    """D(x, y), from an ordinary forward pass over this one text."""
    ids = torch.tensor(np.concatenate([rollout.prompt_ids, rollout.completion_ids]).astype(np.int64))
    return network.model(input_ids=ids.unsqueeze(0)).last_hidden_state[0, -1] @ head


def gad_discriminator(network: PreTrainedModel, head: Tensor, batch: Batch) -> Tensor:
    """mean_i −log σ(D(x, y_T) − D(x, y_i)), i over the student's answers to all prompts."""
    losses = []
    for scored in batch:
        if scored.rollout.origin == "student":
            (other,) = (
                s.rollout
                for s in batch
                if s.rollout.prompt_id == scored.rollout.prompt_id and s.rollout.origin == "others"
            )
            gap = score(network, head, other) - score(network, head, scored.rollout)
            losses.append((1 + (-gap).exp()).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tie", [False, True])
def test_the_discriminator_has_the_loss_and_the_gradient_of_its_paper(tie: bool):
    trainer = make_trainer(method="gad", objective={"judge": {"max_grad_norm": 1e6}}, teacher={"kind": "none"}, tie=tie)
    judge, batch = trainer.judge, make_batch()
    assert isinstance(judge, Discriminator)
    network = make_network(attention=PLAIN, tie=tie)
    head = judge.weights[HEAD].detach().clone().requires_grad_()
    assert judge.rewards(batch) == pytest.approx([score(network, head, s.rollout).item() for s in batch], rel=1e-9)

    loss = gad_discriminator(network, head, batch)
    loss.backward()
    assert judge.learn(batch)["discriminator_loss"] == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(judge.weights[HEAD].grad, head.grad, rtol=1e-8, atol=1e-12)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(judge.weights[f"network.{name}"].grad, parameter.grad, rtol=1e-8, atol=1e-12)


# Preference among the student's own answers.

LENGTHS = (3, 1, 4, 2, 2, 1)
TOKENS = (0, 5, 2, 2, 4, 1, 3, 0, 5, 5, 1, 2, 3)
COMPLETIONS = ((0, 1, 2), (3,), (4, 5, 6, 7), (8, 9), (10, 11), (12,))  # their rows
PROMPTS = ("a", "a", "a", "b", "b", "b")
VOCABULARY = 6
RANKED = PRESETS["ranked_preference"].objective


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT, REFERENCE = drawn(len(TOKENS), VOCABULARY, seed=0), drawn(len(TOKENS), VOCABULARY, seed=1)


def likelihood(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """log q(y | x) = Σ_t log q(y_t)."""
    return sum(((logits[n, TOKENS[n]].exp() / logits[n].exp().sum()).log() for n in rows), torch.zeros(()).double())


def online_dpo(*pairs: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Mean over the two prompts of −log σ(β log q(y⁺)/q_0(y⁺) − β log q(y⁻)/q_0(y⁻)), β = 0.1, sums over tokens."""

    def loss(z: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for best, worst in pairs:
            good, bad = (
                likelihood(z, COMPLETIONS[side]) - likelihood(REFERENCE, COMPLETIONS[side]) for side in (best, worst)
            )
            total = total + (1 + (-(0.1 * good - 0.1 * bad)).exp()).log() / 2
        return total

    return loss


def learn(
    rewards: Sequence[float], *, of: Objective = RANKED, reference: Tensor = REFERENCE, by: str = "student"
) -> tuple[float, Tensor]:
    """`by`: who wrote the last answer to each prompt."""
    reward, deviation = centred(torch.tensor(rewards, dtype=torch.float64), PROMPTS)
    counts = torch.tensor(LENGTHS)
    facts = make_facts(
        LENGTHS,
        token_ids=TOKENS,
        origins=("student", "student", by) * 2,
        prompts=PROMPTS,
        reference=torch.stack([likelihood(reference, (n,)) for n in range(len(TOKENS))]),
        reward=reward.repeat_interleave(counts),
        reward_deviation=deviation.repeat_interleave(counts),
    )
    return evaluate(of, STUDENT, facts)[:2]


def check_paper(found: tuple[float, Tensor], paper: Callable[[Tensor], Tensor]) -> None:
    z = STUDENT.clone().requires_grad_()
    loss = paper(z)
    assert found[0] == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(found[1], torch.autograd.grad(loss, z)[0], rtol=1e-9, atol=1e-12)


def test_ranked_preference_is_online_dpo_of_the_best_over_the_worst_of_each_prompt():
    rewards = [*from_ranking([1, 2, 0]), *from_ranking([0, 1, 2])]
    check_paper(learn(rewards), online_dpo((1, 0), (3, 5)))


def test_only_the_order_of_rewards_is_read():
    assert learn([0.1, 0.9, 0.3, 5.0, 2.0, 1.0])[0] == learn([0.0, 1.0, 0.5, 1.0, 0.5, 0.0])[0]


def test_of_answers_that_earned_the_same_the_first_is_taken():
    check_paper(learn([1.0, 1.0, 0.0, 0.0, 1.0, 0.0]), online_dpo((0, 2), (4, 3)))


def test_a_prompt_whose_answers_all_earned_the_same_teaches_nothing_and_counts():
    found = learn([0.3, 0.3, 0.3, 0.0, 1.0, 0.5])
    check_paper(found, online_dpo((4, 3)))
    assert found[1][:8].abs().max() == 0


def test_it_starts_at_log_2_and_pulls_by_half_of_beta_whatever_the_lengths():
    loss, gradient = learn([1.0, 0.5, 0.0, 0.5, 1.0, 0.0], reference=STUDENT)
    assert loss == pytest.approx(math.log(2))
    z = STUDENT.clone().requires_grad_()
    gap = sum(likelihood(z, COMPLETIONS[good]) - likelihood(z, COMPLETIONS[bad]) for good, bad in ((0, 2), (4, 5)))
    torch.testing.assert_close(gradient, -(0.1 / 2) * torch.autograd.grad(gap, z)[0] / 2)


def test_text_of_others_is_neither_best_nor_worst():
    """It is in the step for another term, here one of no weight."""
    beside = RANKED.model_dump() | {"auxiliaries": {"text": {"over": "others", "loss": "likelihood", "weight": 0.0}}}
    found = learn([0.0, 1.0, 9.0, 0.0, 1.0, -9.0], of=Objective(**beside), by="others")
    check_paper(found, online_dpo((1, 0), (4, 3)))


def test_two_answers_of_a_prompt_are_sodas_pair_if_the_better_were_the_others():
    soda = PRESETS["soda"].objective
    lengths, tokens, prompts = (3, 1, 4, 2), TOKENS[:10], ("a", "a", "b", "b")
    found = []
    for of, origins in ((RANKED, ("student",) * 4), (soda, ("student", "others", "others", "student"))):
        facts = make_facts(
            lengths,
            token_ids=tokens,
            origins=origins,
            prompts=prompts,
            reference=torch.stack([likelihood(REFERENCE, (n,)) for n in range(10)]),
            reward=torch.tensor([-1.0, 1.0, 1.0, -1.0]).double().repeat_interleave(torch.tensor(lengths)),
        )
        found.append(evaluate(of, STUDENT[:10], facts))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_completions_of_prompts_that_tie_are_counted_in_the_report_of_the_step():
    trainer = make_trainer(method="ranked_preference", teacher={"kind": "none"})
    metrics = take_step(trainer, make_batch(), 1).metrics  # of three prompts the last one's answers are both right
    assert metrics["tied_fraction"] == pytest.approx(1 / 3)
    assert metrics["loss"] == pytest.approx(2 / 3 * math.log(2))
    assert metrics["grad_norm"] > 0


# What contradicts itself.

PREFERENCE: dict[str, Any] = {"loss": {"kind": "preference", "pairs": "best_over_worst"}, "aggregation": "sequence_sum"}
REWARDED: dict[str, Any] = {"over": "student", "loss": {"kind": "policy_gradient", "reward": 1.0}}


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        (PREFERENCE, 'pairs "best_over_worst" is over "student", with aggregation "sequence_sum"'),
        ({**PREFERENCE, "over": "student", "aggregation": "token_mean"}, 'with aggregation "sequence_sum"'),
        (
            {"loss": "preference", "over": "student", "aggregation": "sequence_sum"},
            'pairs "others_over_student" is over "all"',
        ),
        ({"loss": "likelihood", "judge": "discriminator"}, "makes a reward that no term reads"),
        ({**REWARDED, "judge": "discriminator", "gates": ["pass_rate"]}, "counts right answers, which"),
        ({**REWARDED, "judge": "discriminator", "over": "privileged"}, 'no term is over "privileged"'),
    ],
)
def test_choices_that_contradict_each_other_are_refused_with_the_way_out(choices: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        objective(**choices)


# Rewards from an order.


@given(st.integers(2, 12).flatmap(lambda n: st.permutations(range(n))))
def test_places_earn_equal_steps_from_one_to_nothing(order: list[int]):
    earned = [from_ranking(order)[answer] for answer in order]
    assert (earned[0], earned[-1]) == (1.0, 0.0)
    assert all(a - b == pytest.approx(1 / (len(order) - 1)) for a, b in itertools.pairwise(earned))


@pytest.mark.parametrize("order", [[], [0], [0, 0], [1, 2], [0, 2], [0, 1, 1], [-1, 0]])
def test_what_is_no_order_of_two_or_more_answers_is_refused(order: list[int]):
    with pytest.raises(ValueError, match="names each of two or more answers once"):
        from_ranking(order)


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(rankings).failed == 0
