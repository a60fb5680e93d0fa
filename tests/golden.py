"""An objective on tensors that fit on a page, through the same path as training: look, terms, chunks, backward.

The head is the identity, so that hidden states are logits and the gradient is with respect to them. A golden test
builds facts, calls `evaluate`, and compares with the paper's equation written out in Python loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from learner import look
from learner.aggregation import subsets
from learner.facts import ORIGINS, Facts, Moment
from learner.logprobs import Tally, head_loss
from learner.objective import row_loss
from potstill.algebra.objective import Objective


def make_facts(
    lengths: Sequence[int], *, token_ids: Sequence[int], origins: Sequence[str] | None = None, **fields: Any
) -> Facts:
    """Facts of completions of these many loss tokens, all written by the student unless `origins` [S] says otherwise.

    Example: make_facts([2, 1], token_ids=[0, 3, 1], teacher=torch.tensor([-0.1, -2.0, -0.3]).double())
    """
    counts = torch.tensor(list(lengths))
    origin = torch.tensor([ORIGINS[name] for name in origins or ["student"] * len(lengths)])
    return Facts(
        token_ids=torch.tensor(list(token_ids)),
        lengths=tuple(lengths),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        origin=origin.repeat_interleave(counts),
        **fields,
    )


def distribution(teacher_logits: Tensor) -> dict[str, Any]:
    """The fields of a teacher inside the learner, from its logits [N, V]."""
    return {"teacher_logits": lambda rows: teacher_logits[rows]}


def evaluate(
    objective: Objective,
    logits: Tensor,
    facts: Facts,
    *,
    step: int = 1,
    steps: int = 10,
    schedule: Mapping[str, float] | None = None,
    chunk_tokens: int = 2,
) -> tuple[float, Tensor, Tally]:
    """Loss, gradient with respect to the student's float64 logits [N, V], and the tally of terms and measures."""
    hidden = logits.detach().clone().requires_grad_()
    head = torch.eye(logits.shape[1], dtype=logits.dtype)
    names = {number: name for name, number in ORIGINS.items()}
    origins = [names[int(part[0])] for part in facts.origin.split(list(facts.lengths))]
    if look.needed(objective, inside=facts.teacher_logits is not None):
        facts = look.look(facts, hidden.detach(), head, chunk_tokens=chunk_tokens)
    loss, tally = head_loss(
        hidden,
        head,
        row_loss(
            objective,
            facts,
            denominators=subsets(facts.lengths, origins),
            moment=Moment(step=step, steps=steps, schedule=schedule or {}),
        ),
        chunk_tokens=chunk_tokens,
    )
    gradient = torch.autograd.grad(loss, hidden)[0]
    return loss.item(), gradient, tally
