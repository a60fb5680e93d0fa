"""Losses of pairs: one text preferred to another. Pure tensors.

DPO compares whole completions, while a loss sees a chunk of rows at a time. The scores of both texts are constants of
the step (learner/look.py), so the loss is linearised there: the same value and the same gradient, row by row.

This file pairs completions by prompt; it neither writes nor chooses them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.facts import ORIGINS, Facts, known
from potstill.algebra.losses import Preference

Pairs = tuple[Tensor, Tensor, Tensor]
"""Indices of the chosen completions [P] and of the rejected ones [P], and how many completions their prompt has [P]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linearised:
    """A loss of whole completions at the current weights, spread over their tokens. Legend: N tokens of the facts."""

    value: Tensor  # [N] of each token; a completion's add up to the loss of its pair
    slope: Tensor  # [N] ∂loss/∂log q of each token

    def loss(self, written: Tensor, rows: Tensor) -> Tensor:
        """[C] of these rows; written [C] are the student's log-probs of them, with gradient."""
        return self.value[rows] + self.slope[rows] * (written - written.detach())


def preference(facts: Facts, loss: Preference) -> Linearised:
    """−log σ(β [log q(y⁺)/ref(y⁺) − log q(y⁻)/ref(y⁻)]) of every pair (DPO, arXiv 2305.18290 eq. 7).

    others_over_student   y⁺ is the prompt's completion with origin "others", y⁻ the one with origin "student" (SODA,
                          arXiv 2604.03873). ValueError where a prompt has not exactly one of each with a loss token
    best_over_worst       of the student's own, those of highest and of lowest reward, the first of equals (OAIF, arXiv
                          2402.04792, whose two answers are ranked by a model). No pair where all earned the same

    Added up as "sequence_sum", a mean over completions, the rows give the mean over prompts in value and gradient, each
    as often as it has completions; a prompt without a pair counts as 0. log 2 where q is the reference. Completions of
    a prompt share a micro-batch. Reads facts.student, reference, prompts and, for the best and the worst, reward.
    """
    chosen, rejected, sizes = _ranked(facts) if loss.pairs == "best_over_worst" else _paired(facts)
    margin = sequence_sums(known(facts.student, "student") - known(facts.reference, "reference"), facts)
    h = loss.beta * (margin[chosen] - margin[rejected])
    lengths = torch.tensor(facts.lengths, device=h.device)
    value, slope = torch.zeros_like(margin), torch.zeros_like(margin)
    pull = logsigmoid(-h).exp() * loss.beta * sizes  # all completions of the prompt are counted in the mean
    for side, sign in ((chosen, -1), (rejected, 1)):
        value[side] = -logsigmoid(h) * sizes / 2 / lengths[side]
        slope[side] = sign * pull
    return Linearised(value=value[facts.sequence], slope=slope[facts.sequence])


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(chosen − rejected) of two scores [B] each → [B]: the discriminator's loss (GAD, arXiv 2511.10643).

    >>> bradley_terry(torch.tensor([3.0]), torch.tensor([3.0]))
    tensor([0.6931])
    """
    return -logsigmoid(chosen - rejected)


def sequence_sums(values: Tensor, facts: Facts) -> Tensor:
    """[N] values of tokens → [S] sums over each completion, in float64."""
    sums = torch.zeros(len(facts.lengths), dtype=torch.float64, device=values.device)
    return sums.index_add(0, facts.sequence, values.double())


def _paired(facts: Facts) -> Pairs:
    """Others' over the student's."""
    by_prompt = _by_prompt(facts)
    for prompt, found in by_prompt.items():
        if {origin: len(indices) for origin, indices in found.items()} != _ONE_OF_EACH:
            raise ValueError(
                f"a preference needs one completion of the student and one of others in the same micro-batch for every "
                f"prompt, but prompt {prompt!r} has {_counted(found)}"
            )
    others, student = ORIGINS["others"], ORIGINS["student"]
    return _pairs([(found[others][0], found[student][0], 2) for found in by_prompt.values()], facts)


def _ranked(facts: Facts) -> Pairs:
    """The student's best over its worst."""
    earned = known(facts.reward, "reward")
    starts = torch.tensor(facts.lengths).cumsum(0) - torch.tensor(facts.lengths)
    found = []
    for by_origin in _by_prompt(facts).values():
        own = by_origin[ORIGINS["student"]]
        rewards = earned[starts[own]].tolist()
        if own and max(rewards) > min(rewards):
            found.append((own[rewards.index(max(rewards))], own[rewards.index(min(rewards))], len(own)))
    return _pairs(found, facts)


def _pairs(found: Sequence[tuple[int, int, int]], facts: Facts) -> Pairs:
    chosen, rejected, sizes = torch.tensor(found, dtype=torch.int64, device=facts.origin.device).reshape(-1, 3).T
    return chosen, rejected, sizes


def _by_prompt(facts: Facts) -> dict[str, dict[int, list[int]]]:
    """Indices of the completions that have a loss token, by prompt and origin."""
    if facts.prompts is None:
        raise ValueError("the objective reads facts.prompts, which is missing")
    by_prompt: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    parts = torch.split(facts.origin, list(facts.lengths))
    for index, (prompt, part) in enumerate(zip(facts.prompts, parts, strict=True)):
        if len(part) > 0:
            by_prompt[prompt][int(part[0])].append(index)
    return by_prompt


_ONE_OF_EACH = {ORIGINS["student"]: 1, ORIGINS["others"]: 1}


def _counted(found: dict[int, list[int]]) -> str:
    names = {number: name for name, number in ORIGINS.items()}
    return ", ".join(f"{len(indices)} of {names[origin]!r}" for origin, indices in sorted(found.items()))
