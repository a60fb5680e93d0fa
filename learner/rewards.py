"""What the rewards of a whole step say: relative to the group of a prompt's completions, and as its pass rate.

Legend: R completions of the step; groups [R] names the prompt of each; results are float64. Every function wants the
step as a whole, before it is split over micro-batches and ranks. None of them shapes, clips or whitens a reward, and a
NaN is an error: a completion that was not judged has not failed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def centred(rewards: Tensor, groups: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(each reward less its group's mean, the group's deviation), both [R] (GRPO, DeepSeekMath, arXiv 2402.03300).

    The deviation divides by the group's size G. G − 1 would be a constant factor for groups of equal size and NaN for a
    group of one, which here has advantage 0 and deviation 0.
    Raises ValueError for a reward that is not finite.

    >>> advantages, deviation = centred(torch.tensor([1.0, 0.0, 5.0]), ["a", "a", "b"])
    >>> advantages.tolist(), deviation.tolist()
    ([0.5, -0.5, 0.0], [0.5, 0.5, 0.0])
    """
    exact = judged(rewards, groups)
    sizes = _group_sums(torch.ones_like(exact), groups)
    advantages = exact - _group_sums(exact, groups) / sizes
    return advantages, (_group_sums(advantages**2, groups) / sizes).sqrt()


def pass_rates(rewards: Tensor, groups: Sequence[str], *, smoothing: float) -> Tensor:
    """[R] (successes + smoothing) / (completions + 2 · smoothing) of each one's prompt; 1 is Laplace's rule.

    A success has full marks, reward ≥ 1 before any penalty: partial credit is a reward, not a right answer.
    Raises ValueError for a reward that is not finite.

    >>> pass_rates(torch.tensor([1.0, 0.5, 1.0]), ["a", "a", "b"], smoothing=0).tolist()
    [0.5, 0.5, 1.0]
    """
    right = (judged(rewards, groups) >= 1).double()
    sizes = _group_sums(torch.ones_like(right), groups)
    return (_group_sums(right, groups) + smoothing) / (sizes + 2 * smoothing)


def pass_rate_weights(rates: Tensor, *, a: float, b: float) -> Tensor:
    """[R] rate^a (1 − rate)^b over its mean (PACED, arXiv 2603.11178). Largest at a / (a + b); all 1 where a = b = 0.

    Raises ValueError for a rate outside [0, 1], and where every weight is 0.

    >>> pass_rate_weights(torch.tensor([0.0, 0.5, 1.0]), a=1, b=1).tolist()
    [0.0, 3.0, 0.0]
    """
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError(f"pass rates lie in [0, 1], not {rates.tolist()}")
    weights = rates.double() ** a * (1 - rates.double()) ** b
    if not bool((weights > 0).any()):
        raise ValueError(
            'gate "pass_rate" leaves nothing to learn from: each prompt of the step always fails or always succeeds. '
            "Set its smoothing to 1, or take prompts that the student sometimes solves"
        )
    return weights / weights.mean()


def penalised(
    rewards: Tensor, student_logprobs: Sequence[Tensor], teacher_logprobs: Sequence[Tensor], *, kl_penalty: float
) -> Tensor:
    """[R] reward − kl_penalty · mean over the completion's tokens of (log student − log teacher).

    student_logprobs   R tensors [T_i] with which the completion was sampled
    teacher_logprobs   R tensors [T_i] of whom it shall stay near

    The mean estimates KL(sampler ‖ other) per token, so a sampler that strays loses reward. RL-OPSD samples under the
    student's prompt; π-Distill (arXiv 2602.04942) under the privileged one, and its other is the student's own prompt.
    It belongs before `centred`. Raises ValueError where the result is not finite: a reward or a score is missing.

    >>> penalised(torch.tensor([1.0]), [torch.tensor([-1.0, -2.0])], [torch.tensor([-2.0, -3.0])], kl_penalty=0.25)
    tensor([0.7500], dtype=torch.float64)
    """
    pairs = zip(rewards.tolist(), student_logprobs, teacher_logprobs, strict=True)
    found = [reward - kl_penalty * (student - teacher).double().mean().item() for reward, student, teacher in pairs]
    for index, reward in enumerate(found):
        if not math.isfinite(reward):
            raise ValueError(f"completion {index} has reward {reward} after its KL penalty; is it judged and scored?")
    return torch.tensor(found, dtype=torch.float64, device=rewards.device)


def judged(rewards: Tensor, groups: Sequence[str]) -> Tensor:
    """The rewards in float64, in which a group of equal rewards is less its mean exactly 0.

    Raises ValueError for a reward that is not finite.
    """
    for index, (reward, group) in enumerate(zip(rewards.tolist(), groups, strict=True)):
        if not math.isfinite(reward):
            raise ValueError(f"completion {index} of prompt {group!r} has reward {reward}; was it judged?")
    return rewards.double()


def _group_sums(values: Tensor, groups: Sequence[str]) -> Tensor:
    """[R] the sum over each value's group."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([numbers[group] for group in groups], dtype=torch.long, device=values.device)
    return values.new_zeros(len(numbers)).index_add(0, index, values)[index]
