"""Where a student's text would gain most from one token of its teacher's. Pure; it rewrites nothing.

The paper then puts the teacher's token there and lets the student write on from it (SCRG, arXiv 2407.10068).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.errors import NonFinite


def positions(divergence: Tensor, token_ids: Tensor, teacher_best: Tensor, lengths: Sequence[int]) -> Tensor:
    """[S] of each completion the token at which KL(p‖q) is largest among those that are not the teacher's first choice.

    divergence    [N] nats, of S completions one after the other, ≥ 0, perhaps infinite
    token_ids     [N] the written tokens
    teacher_best  [N] the teacher's most probable token there
    lengths       [S] tokens of each completion

    Counted from 0 within the completion, the first of equals; −1 where the teacher would have written every token
    itself, which the paper leaves open: such a text stays as it is. Raises NonFinite for a NaN.

    >>> positions(torch.tensor([9.0, 1.0, 2.0, 5.0]), torch.tensor([4, 4, 4, 4]), torch.tensor([4, 0, 0, 4]), (3, 1))
    tensor([ 2, -1])
    """
    if bool(divergence.isnan().any()):
        raise NonFinite("a divergence is NaN: no position of its completion is known to be the worst")
    candidates = divergence.masked_fill(token_ids == teacher_best, -math.inf)
    found = [_first_of_largest(part) for part in candidates.split_with_sizes(list(lengths))]
    return torch.tensor(found, device=divergence.device)


def _first_of_largest(values: Tensor) -> int:
    if not bool((values > -math.inf).any()):
        return -1
    return int((values == values.max()).nonzero()[0])
