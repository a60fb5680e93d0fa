"""A look at the step before its loss: the current student's log-probs and entropies, without gradient.

Gates, returns and sequence ratios need whole completions, while the loss sees a chunk of rows at a time. All of them
are constants of the step, so they are settled first. It costs one more product with the head; only objectives that need
it pay.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from learner.divergences import entropy
from learner.facts import Facts, Logits
from learner.logprobs import upcast
from potstill.algebra.corrections import GeometricRejection
from potstill.algebra.gates import EarlyWeight, EntropyGap, Evidence, Opener, StudentEntropyTop, TeacherEntropyAbove
from potstill.algebra.losses import CHUNKED, PolicyGradient, Preference
from potstill.algebra.objective import ESTIMATES, Objective, Term

_LOOKING_GATES = (EarlyWeight, EntropyGap, Evidence, Opener, StudentEntropyTop, TeacherEntropyAbove)


def needed(objective: Objective, *, inside: bool) -> bool:
    """Whether a term cannot be settled chunk by chunk. `inside`: the teacher's logits are here, not its log-probs."""
    if objective.reads_reference:
        return True
    return any(_looks(term) or (inside and isinstance(term.loss, ESTIMATES)) for term in objective.terms.values())


@torch.no_grad()
def look(facts: Facts, hidden: Tensor, head: Tensor, *, chunk_tokens: int) -> Facts:
    """The facts with `student` and `student_entropy`; with the teacher's and reference's where their logits are here.

    hidden [N, D], head [V, D]. A few rows of logits exist at a time.
    """
    sides: dict[str, Logits] = {"student": lambda rows: upcast(hidden[rows] @ head.T)}
    sides |= {} if facts.teacher_logits is None else {"teacher": facts.teacher_logits}
    sides |= {} if facts.reference_logits is None else {"reference": facts.reference_logits}
    found: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(hidden), chunk_tokens):
        rows = torch.arange(start, min(start + chunk_tokens, len(hidden)), device=hidden.device)
        for side, logits in sides.items():
            logprobs = logits(rows).log_softmax(-1)
            found[side].append(logprobs.gather(-1, facts.token_ids[rows, None]).squeeze(-1))
            if side != "reference":
                found[f"{side}_entropy"].append(entropy(logprobs))
    seen: dict[str, Any] = {name: torch.cat(parts) for name, parts in found.items()}
    return dataclasses.replace(facts, **seen)


def _looks(term: Term) -> bool:
    returns = isinstance(term.loss, PolicyGradient) and term.loss.discount > 0
    by_sequence = getattr(term.correction, "level", "token") == "sequence" or isinstance(
        term.correction, GeometricRejection
    )
    gated = any(isinstance(gate, _LOOKING_GATES) for gate in term.gates)
    return returns or by_sequence or gated or isinstance(term.loss, (Preference, *CHUNKED))
