"""Losses of pairs: one text preferred to another. Pure tensors.

DPO compares whole completions, while a loss sees a chunk of rows at a time. The scores of both texts are constants of
the step (learner/look.py), so the loss is linearised there: the same value and the same gradient, row by row.

This file pairs completions by prompt; it neither writes nor chooses them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.facts import ORIGINS, Facts, known


@dataclass(frozen=True, slots=True, kw_only=True)
class Linearised:
    """A loss of whole completions at the current weights, spread over their tokens. Legend: N tokens of the facts."""

    value: Tensor  # [N] of each token; a completion's add up to the loss of its pair
    slope: Tensor  # [N] ∂loss/∂log q of each token

    def loss(self, written: Tensor, rows: Tensor) -> Tensor:
        """[C] of these rows; written [C] are the student's log-probs of them, with gradient."""
        return self.value[rows] + self.slope[rows] * (written - written.detach())


def preference(facts: Facts, *, beta: float) -> Linearised:
    """−log σ(β [log q(y⁺)/ref(y⁺) − log q(y⁻)/ref(y⁻)]) of every pair (DPO, arXiv 2305.18290 eq. 7; SODA, 2604.03873).

    y⁺ is the prompt's completion with origin "others", y⁻ the one with origin "student". Added up as "sequence_sum", a
    mean over completions, the rows give the mean over pairs in value and gradient. log 2 where q is the reference.

    Reads facts.student, reference and prompts. Raises ValueError where a prompt has not exactly one loss-bearing
    completion of each origin: pairs share a micro-batch.
    """
    chosen, rejected = _paired(facts)
    margin = sequence_sums(known(facts.student, "student") - known(facts.reference, "reference"), facts)
    h = beta * (margin[chosen] - margin[rejected])
    lengths = torch.tensor(facts.lengths, device=h.device)
    value, slope = torch.zeros_like(margin), torch.zeros_like(margin)
    pull = 2 * beta * logsigmoid(-h).exp()  # 2: both completions of a pair are counted in the mean
    for side, sign in ((chosen, -1), (rejected, 1)):
        value[side] = -logsigmoid(h) / lengths[side]
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


def _paired(facts: Facts) -> tuple[Tensor, Tensor]:
    """Indices of the chosen completions [P] and of the rejected ones [P]."""
    if facts.prompts is None:
        raise ValueError("the objective reads facts.prompts, which is missing")
    by_prompt: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    parts = torch.split(facts.origin, list(facts.lengths))
    for index, (prompt, part) in enumerate(zip(facts.prompts, parts, strict=True)):
        if len(part) > 0:
            by_prompt[prompt][int(part[0])].append(index)
    for prompt, found in by_prompt.items():
        if {origin: len(indices) for origin, indices in found.items()} != _ONE_OF_EACH:
            raise ValueError(
                f"a preference needs one completion of the student and one of others in the same micro-batch for every "
                f"prompt, but prompt {prompt!r} has {_counted(found)}"
            )
    sides = [[found[ORIGINS[who]][0] for found in by_prompt.values()] for who in ("others", "student")]
    chosen, rejected = (torch.tensor(side, dtype=torch.int64, device=facts.origin.device) for side in sides)
    return chosen, rejected


_ONE_OF_EACH = {ORIGINS["student"]: 1, ORIGINS["others"]: 1}


def _counted(found: dict[int, list[int]]) -> str:
    names = {number: name for name, number in ORIGINS.items()}
    return ", ".join(f"{len(indices)} of {names[origin]!r}" for origin, indices in sorted(found.items()))
