"""The returns of a policy gradient: by a literal loop, and by enumerating every text of two tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learner import estimators
from learner.chunk import Chunk
from learner.divergences import reverse_kl
from learner.facts import Facts
from potstill.algebra.losses import PolicyGradient
from tests.small_logits import EXACT, NOW, V, completions, gradient, logits, logprobs


def future(facts: Facts, **choice: Any) -> Tensor:
    found = estimators.future_advantage(PolicyGradient(**choice), facts)
    assert found is not None
    return found


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_the_future_is_what_a_literal_loop_makes_it(discount: float, length_normalised: bool) -> None:
    lengths = (1, 7, 0, 4)
    student, teacher = logits(seed=1, shape=(12,)), logits(seed=2, shape=(12,))
    expected = []
    for advantages in (0.5 * (teacher - student)).split(lengths):
        for t in range(len(advantages)):
            later = [discount ** (u - t) * float(advantages[u]) for u in range(t + 1, len(advantages))]
            expected.append(sum(later) / (max(len(later), 1) if length_normalised else 1))
    facts = completions(*lengths, student=student, teacher=teacher)
    found = future(facts, discount=discount, length_normalised=length_normalised, distil=0.5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_discount_counts_from_the_token_and_not_from_the_beginning() -> None:
    facts = completions(4, student=torch.zeros(4), teacher=torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert future(facts, discount=0.5).tolist() == [0.125, 0.25, 0.5, 0.0]


def test_tokens_without_loss_take_no_time() -> None:
    places = torch.tensor([0, 40, 41])  # between the first two lies a tool's answer
    facts = completions(3, positions=places, student=torch.zeros(3), teacher=torch.tensor([0.0, 0.0, 1.0]))
    assert future(facts, discount=0.5).tolist() == [0.25, 0.5, 0.0]


def test_a_completion_whose_scores_are_missing_is_its_own_affair() -> None:
    teacher = torch.tensor([1.0, 2.0, torch.nan, torch.nan, 3.0, 4.0])
    found = future(completions(2, 2, 2, student=torch.zeros(6), teacher=teacher), discount=1.0)
    assert found[[0, 1, 4, 5]].tolist() == [2.0, 0.0, 4.0, 0.0]
    assert found[2].isnan()


def test_the_future_is_of_the_teachers_part_without_reward_or_baseline() -> None:
    facts = completions(3, student=logits(seed=1, shape=(3,)), teacher=logits(seed=2, shape=(3,)))
    richer = future(facts, discount=1.0, baseline="kl", reward=1.0)
    assert richer.tolist() == future(facts, discount=1.0).tolist()


@pytest.mark.parametrize(
    ("choice", "score"),
    [
        ({"extrapolation": 2.0}, lambda q, p, ref, mu: 2 * p - q - ref),
        ({"student": "sampler"}, lambda q, p, ref, mu: p - mu),
        ({"score": "power", "exponent": 2.0}, lambda q, p, ref, mu: p.exp() ** 2 - q.exp() ** 2),
    ],
)
def test_the_future_is_scored_as_the_token_itself_is(choice: dict[str, Any], score: Callable[..., Tensor]) -> None:
    q, p, ref, mu = (logprobs(seed=seed, shape=(3,)) for seed in range(4))
    facts = completions(3, student=q, teacher=p, reference=ref, behaviour=mu)
    _, second, third = score(q, p, ref, mu).tolist()
    assert future(facts, discount=1.0, **choice).tolist() == pytest.approx([second + third, third, 0.0])


def test_there_is_no_future_without_a_discount_or_a_teachers_part() -> None:
    facts = completions(2, student=torch.zeros(2), teacher=torch.ones(2))
    assert estimators.future_advantage(PolicyGradient(discount=0.0), facts) is None
    assert estimators.future_advantage(PolicyGradient(discount=1.0, distil=0.0, reward=1.0), facts) is None


def test_a_look_that_was_not_taken_is_named() -> None:
    with pytest.raises(ValueError, match=r"facts\.student"):
        future(completions(2, teacher=torch.ones(2)), discount=1.0)


# A tree of two steps: q(a) q(b | a), every text enumerated

FIRST, SECOND = torch.cartesian_prod(torch.arange(V), torch.arange(V)).unbind(-1)
TOKENS = torch.stack([FIRST, SECOND], -1).flatten()  # of V² texts of two tokens, packed
NODES = torch.stack([torch.zeros_like(FIRST), 1 + FIRST], -1).flatten()  # row 0: the first token; 1 + a: after token a
TREE, TEACHER = logits(seed=1, shape=(1 + V, V)), logprobs(seed=2, shape=(1 + V, V))


def of_texts(table: Tensor) -> Tensor:
    """[V²] log-probs of whole texts."""
    return table[NODES, TOKENS].reshape(-1, 2).sum(-1)


GRADIENT_OF_THE_SEQUENCES_KL = gradient(lambda z: reverse_kl(of_texts(z.log_softmax(-1)), of_texts(TEACHER)), TREE)


def expected_over_texts(choice: PolicyGradient, *, own: bool = True) -> Tensor:
    """`own` false: as with future_only."""
    logq = TREE.log_softmax(-1)
    facts = completions(*(2,) * V**2, token_ids=TOKENS, student=logq[NODES, TOKENS], teacher=TEACHER[NODES, TOKENS])

    def loss(z: Tensor) -> Tensor:
        chunk = Chunk(z[NODES], torch.arange(len(NODES)), facts)
        later = estimators.future_advantage(choice, facts)
        advantage = own * estimators.advantage(choice, chunk, moment=NOW) + (0 if later is None else later)
        probability = of_texts(logq).exp().repeat_interleave(2)
        return (probability * estimators.policy_gradient(chunk.written, advantage)).sum()

    return gradient(loss, TREE)


def test_at_discount_one_it_is_the_gradient_of_the_sequences_kl() -> None:
    torch.testing.assert_close(expected_over_texts(PolicyGradient(discount=1.0)), GRADIENT_OF_THE_SEQUENCES_KL, **EXACT)


def test_at_discount_zero_it_is_biased_for_the_first_token_only() -> None:
    bias = expected_over_texts(PolicyGradient()) - GRADIENT_OF_THE_SEQUENCES_KL
    assert bias[0].abs().max() > 0.05
    assert bias[1:].abs().max() < 1e-14


def test_the_future_alone_is_what_the_exact_single_step_term_lacks() -> None:
    """MiniLLM's decomposition: the sequence's gradient is the exact KL of every position, and the future."""
    reached = torch.cat([torch.ones(1).double(), TREE[0].softmax(-1)])  # [1 + V] probability of each position
    exact_steps = gradient(lambda z: (reached * reverse_kl(z.log_softmax(-1), TEACHER)).sum(), TREE)
    later = expected_over_texts(PolicyGradient(discount=1.0), own=False)
    torch.testing.assert_close(exact_steps + later, GRADIENT_OF_THE_SEQUENCES_KL, **EXACT)
