"""What each token counts for: factors ≥ 0 from the facts of a step, without gradient.

A gate sees one completion at a time and of it only the tokens that its term reads, so that it depends neither on what a
completion is packed with nor on another term's tokens. No gate decides what is right or scales a whole term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

import torch
from torch import Tensor

from learner.facts import Facts, known
from potstill.algebra.gates import (
    AlignedOneToOne,
    AlignedSpan,
    Confidence,
    EarlyWeight,
    EntropyGap,
    Evidence,
    Gate,
    Opener,
    PassRate,
    PerDomain,
    PerTeacher,
    StudentEntropyTop,
    TeacherEntropyAbove,
    Window,
)
from potstill.errors import ConfigError, NonFinite

_CHUNK_ROWS = 128  # of teacher's logits at a time


@torch.no_grad()
def gate_factor(gate: Gate, facts: Facts, read: Tensor) -> Tensor:
    """[N] float64 factors of the rows that are read [N]; 0 for the others, whatever their facts are.

    Raises ValueError for a field that was not gathered, NonFinite for a NaN in a row that is read, ConfigError for a
    domain or a teacher that the gate does not list.

    >>> facts = Facts(token_ids=torch.tensor([7, 7, 7]), lengths=(3,), positions=torch.arange(3),
    ...               origin=torch.zeros(3, dtype=torch.long))
    >>> gate_factor(Window(first=1), facts, torch.ones(3, dtype=torch.bool)).tolist()
    [0.0, 1.0, 1.0]
    """
    factor = torch.zeros(read.shape, dtype=torch.float64, device=read.device)
    factor[read] = _factor(gate, facts, read).double()
    return factor


def _factor(gate: Gate, facts: Facts, read: Tensor) -> Tensor:
    """[R] of the rows that are read."""

    def of(name: str) -> Tensor:
        return _read_values(getattr(facts, name), name, gate, read)

    match gate:
        case TeacherEntropyAbove(nats=nats):
            return of("teacher_entropy") > nats
        case EntropyGap(scale=scale):
            return ((of("student_entropy") - of("teacher_entropy")) / scale).sigmoid()
        case StudentEntropyTop(share=share):
            return _by_completion(lambda entropy: top_share(entropy, share), of("student_entropy"), facts, read)
        case Opener(share=share):
            return _by_completion(lambda entropy: opener(entropy, share), of("student_entropy"), facts, read)
        case EarlyWeight(gamma=gamma):
            return _by_completion(lambda a: early_weight(a, gamma), of("teacher") - of("student"), facts, read)
        case Window(first=first, last=last):
            position = facts.positions[read]
            return (position >= first) & (position < (math.inf if last is None else last))
        case Confidence():
            return _confidence(gate, facts, read)
        case PerDomain(weights=weights):
            return _by_name(weights, facts.domains, "domain", facts.sequence[read])
        case PerTeacher(weights=weights):
            return _by_name(weights, facts.teachers, "teacher", facts.sequence[read])
        case PassRate():
            return of("pass_rate_weight")
        case Evidence(clip=clip):
            return evidence(of("teacher") - of("student"), of("reward"), clip)
        case AlignedOneToOne():
            return _one_to_one(facts)[read]
        case AlignedSpan():
            return ~_one_to_one(facts)[read]


def top_share(entropy: Tensor, share: float) -> Tensor:
    """[T] entropies → [T] whether a token is among the ⌈share · T⌉ of the highest; of equals the earlier one.

    TSD-KD (arXiv 2603.13260). Its code keeps those above the share's quantile: 90 % of them for a share of 10 %.

    >>> top_share(torch.tensor([0.1, 0.9, 0.2, 0.8]), 0.5).tolist()
    [False, True, False, True]
    """
    count = math.ceil(Decimal(str(share)) * len(entropy))  # in floats 0.07 · 100 is more than 7
    chosen = torch.zeros_like(entropy, dtype=torch.bool)
    chosen[entropy.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def opener(entropy: Tensor, share: float) -> Tensor:
    """[T] entropies → [T] whether a token is in the shortest beginning that holds `share` of their sum.

    TSD-KD (arXiv 2603.13260). Its code finds one end for the flattened batch and leaves out the token that reaches the
    share, so that a sure start would have no opener at all.

    >>> opener(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.2).tolist()
    [True, True, False, False]
    """
    held = entropy.clamp(min=0).cumsum(-1)  # rounding can make the entropy of a sure token negative
    before = torch.cat([held.new_zeros(1), held])[:-1]
    return before < share * held[-1:]


def early_weight(advantage: Tensor, gamma: float) -> Tensor:
    """[T] advantages → [T] 1 + γ (1 − Σ_{≤t} |A| / Σ |A|), in [1, 1 + γ] and falling; 1 where all of them are 0.

    IW-OPD (arXiv 2606.22600).

    >>> early_weight(torch.tensor([-1.0, 3.0]), 0.5).tolist()
    [1.375, 1.0]
    """
    passed = advantage.abs().cumsum(-1)
    share = torch.where(passed[-1:] > 0, passed / passed[-1:], 1.0)
    return 1 + gamma * (1 - share)


def evidence(log_ratio: Tensor, reward: Tensor, clip: float) -> Tensor:
    """clip((p/q)^sign(A), 1 − ε, 1 + ε) of log p − log q [R] and centred rewards A [R]; > 0, so A keeps its sign.

    RLSD (arXiv 2604.03128).

    >>> evidence(torch.tensor([9.0, 9.0, 9.0]), torch.tensor([0.5, -0.5, 0.0]), 0.25).tolist()
    [1.25, 0.75, 1.0]
    """
    bounded = log_ratio.clamp(-20, 20)  # a token that the teacher never writes: 0 · inf would be NaN
    return (reward.sign() * bounded).exp().clamp(1 - clip, 1 + clip)


def _one_to_one(facts: Facts) -> Tensor:
    """[N] whether the teacher's top-k is in the student's ids; a teacher of the same tokenizer owes it everywhere."""
    if facts.chunks is None:
        return torch.ones_like(facts.token_ids, dtype=torch.bool)
    return (known(facts.topk_ids, "topk_ids") >= 0).any(-1)


def _confidence(gate: Gate, facts: Facts, read: Tensor) -> Tensor:
    """[R] the teacher's highest probability, from its top-k or, inside the learner, from its logits."""
    logits = facts.teacher_logits
    if facts.teacher_topk is not None or logits is None:
        return _read_values(facts.teacher_topk, "teacher_topk", gate, read).amax(-1).exp()
    rows = read.nonzero().squeeze(-1)
    return torch.cat([logits(part).log_softmax(-1).amax(-1).exp() for part in torch.split(rows, _CHUNK_ROWS)])


def _read_values(field: Tensor | None, name: str, gate: Gate, read: Tensor) -> Tensor:
    """The field's rows that are read, in float64. A NaN would pass a comparison as 0, so it is refused here."""
    values = known(field, name)[read].double()
    if bool(values.isnan().any()):
        raise NonFinite(
            f"gate {gate.kind!r} reads facts.{name}, which is NaN in a row that counts; is a score missing?"
        )
    return values


def _by_completion(factor: Callable[[Tensor], Tensor], values: Tensor, facts: Facts, read: Tensor) -> Tensor:
    """[R] the factor of each completion's read values, in order."""
    lengths = [int(part.sum()) for part in torch.split(read, list(facts.lengths))]
    return torch.cat([factor(part) for part in torch.split(values, lengths)])


def _by_name(weights: Mapping[str, float], names: Sequence[str] | None, what: str, sequence: Tensor) -> Tensor:
    """[R] the weight of the domain or teacher of the completion [R] that each token belongs to."""
    if names is None:
        raise ValueError(f"the objective reads facts.{what}s, which is missing")
    found = torch.zeros(len(names), dtype=torch.float64, device=sequence.device)
    for index in sorted(set(sequence.tolist())):
        if names[index] not in weights:
            listed = ", ".join(sorted(weights))
            raise ConfigError(f'gate "per_{what}" has no weight for {what} {names[index]!r}; add it to: {listed}')
        found[index] = weights[names[index]]
    return found[sequence]
