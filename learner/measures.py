"""Whether a step's signal is healthy, row by row: does the student still say what it said when the text was sampled,
and do student and teacher speak of the same tokens? Pure tensors, no gradient.

Legend: C rows, O outcomes; q student now, p teacher, μ what sampled the text. It judges nothing: alarms do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def of_sampler(written: Tensor, behaviour: Tensor, age: Tensor) -> Mapping[str, Tensor]:
    """How far the student has moved from its text, by the age of each token; a measure without a row is left out.

    written    [C] log q of the written tokens
    behaviour  [C] log μ of them; NaN where nobody sampled
    age        [C] versions since each was written; −1: not by the student

    sampler_gap   |log q − log μ| at age 0, where both are the same weights: numerics, or another model than one thinks
    staleness_kl  q/μ − 1 − log(q/μ) at ages above: the k3 estimate of KL(μ‖q) (Schulman 2020), never negative

    >>> found = of_sampler(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log(), torch.tensor([0, 1]))
    >>> {name: round(rows.item(), 4) for name, rows in found.items()}  # 2 − 1 − log 2
    {'sampler_gap': 0.0, 'staleness_kl': 0.3069}
    """
    log_ratio = written - behaviour
    known = log_ratio.isfinite()
    fresh, stale = log_ratio[known & (age == 0)], log_ratio[known & (age > 0)]
    found = {"sampler_gap": fresh.abs(), "staleness_kl": torch.expm1(stale) - stale}
    return {name: rows for name, rows in found.items() if len(rows)}


def overlap(logq: Tensor, logp: Tensor) -> Tensor:
    """Σ min(q, p) of [C, O] log-probs → [C]: 1 where both say the same, 0 where they share nothing.

    It is 1 less the total variation. Counting the ids that are in both top-k (arXiv 2604.13016 sees 72% → 91% in runs
    that work) weighs a token that neither would ever write like one that both would.

    >>> round(overlap(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()).item(), 4)
    0.75
    """
    return torch.minimum(logq, logp).exp_().sum(-1)
