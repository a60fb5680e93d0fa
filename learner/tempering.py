"""What becomes of both sides' logits before they are compared: tempered, standardised, or another target altogether.

Legend: C rows, V vocabulary, K ids of a support, z logits, q student, p teacher. Both sides come back as logits: they
need a log-softmax. Only the student's own side has a gradient: a target is a constant. −inf marks what is not in a
row's support, and stays −inf.

This file computes no loss, and no schedule: it is told what TAID's t is now.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.chunk import Chunk
from learner.facts import Moment
from potstill.algebra.targets import Bridge, OneHotMix, Standardised, Swing, Taid, Target, Tempered

Both = tuple[Tensor, Tensor]


def apply(target: Target, name: str, chunk: Chunk, teacher_logits: Tensor, moment: Moment) -> Both:
    """(student logits, teacher logits), each [C, V]. `name` is the term's, under which `moment` holds its schedule.

    Raises ValueError for a field of the facts that the target reads and that is missing.
    """
    match target:
        case Tempered() | Standardised():
            return apply_over(target, chunk.logits, teacher_logits)
        case Taid():
            return chunk.logits, taid(chunk.logits, teacher_logits, t=moment.schedule[name])
        case OneHotMix(share=share):
            written = chunk.fact("token_ids")
            return chunk.logits, one_hot_mix(teacher_logits, written, share=moment.at(share))
        case Swing(max_temperature=max_temperature, noise=noise):
            privacy = chunk.fact("privacy").to(teacher_logits.dtype)
            warm = swing(teacher_logits, privacy, max_temperature=max_temperature)
            return chunk.logits, noisy(warm, noise * privacy, chunk.fact("uniforms")) if noise > 0 else warm
        case Bridge(beta=beta):
            return chunk.logits, bridge(chunk.logits, teacher_logits, beta=beta)


def apply_over(target: Target, student: Tensor, teacher: Tensor) -> Both:
    """Tempered or Standardised logits (or log-probs) [C, K] of one support. Raises ValueError for any other target."""
    match target:
        case Tempered():
            return tempered(student, target.student), tempered(teacher, target.teacher)
        case Standardised(temperature=temperature):
            among = (student != -math.inf) & (teacher != -math.inf)
            return (
                standardised(student, temperature=temperature, among=among),
                standardised(teacher, temperature=temperature, among=among),
            )
    raise ValueError(f"target {target.kind!r} needs the whole vocabulary")


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """z / T (Hinton et al., arXiv 1503.02531; apart for each side: FIRST, 2408.12168). T of a tensor: [C, 1]."""
    return logits / temperature


def standardised(logits: Tensor, *, temperature: float, among: Tensor) -> Tensor:
    """(z − mean) / deviation / T over the ids `among` [C, V] bool (Logit Standardization, arXiv 2403.01427).

    The same after z → 3z + 5: absolute confidence is lost. The deviation divides by n, that of the official code by
    n − 1. Differentiable through mean and deviation. A row of equal logits gives zeros.

    >>> z = torch.tensor([1.0, 3.0]); standardised(z, temperature=2.0, among=torch.tensor([True, True]))
    tensor([-0.5000,  0.5000])
    """
    absent = logits == -math.inf
    filled = logits.masked_fill(absent, 0.0)  # an infinity times a gradient of 0 is NaN
    count = among.sum(-1, keepdim=True)
    centred = filled - filled.masked_fill(~among, 0.0).sum(-1, keepdim=True) / count
    variance = centred.masked_fill(~among, 0.0).square().sum(-1, keepdim=True) / count
    deviation = variance.clamp(min=_LEAST_DEVIATION**2).sqrt()
    return (centred / deviation / temperature).masked_fill(absent, -math.inf)


def taid(student: Tensor, teacher: Tensor, *, t: float) -> Tensor:
    """(1 − t) z_student + t z_teacher, without gradient (TAID, arXiv 2501.16937). Both [C, V] → [C, V].

    t = 0: the student itself, from which it learns nothing; t = 1: the teacher.

    >>> taid(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 0.0]), t=0.25)
    tensor([1.0000, 1.5000])
    """
    if t in (0, 1):  # 0 · −inf is NaN
        return teacher if t == 1 else student.detach()
    return (1 - t) * student.detach() + t * teacher


def one_hot_mix(teacher: Tensor, token_ids: Tensor, *, share: float) -> Tensor:
    """log[(1 − share) · 1[v = token] + share · p_v] (PS-KD, arXiv 2006.12000). [C, V], [C] → [C, V].

    share = 0: the written token alone; 1: the teacher.

    >>> one_hot_mix(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0]), share=0.5).exp()
    tensor([[0.7500, 0.2500]])
    """
    log_share, log_rest = (math.log(x) if x > 0 else -math.inf for x in (share, 1 - share))
    mixed = teacher.log_softmax(-1) + log_share
    ids = token_ids.unsqueeze(-1)
    gold = mixed.gather(-1, ids)
    return mixed.scatter(-1, ids, torch.logaddexp(gold, torch.full_like(gold, log_rest)))


def swing(teacher: Tensor, privacy: Tensor, *, max_temperature: float) -> Tensor:
    """z / T with T = 1 + (max_temperature − 1) π. [C, V], π [C] in [0, 1] → [C, V].

    After Swing Distillation (arXiv 2212.08349): the temperature rises with how likely a token is private, and noise is
    added (`noisy`). The formulas are this project's; no formal privacy follows from them.

    >>> swing(torch.tensor([[0.0, 8.0]]), torch.tensor([0.5]), max_temperature=3.0)
    tensor([[0., 4.]])
    """
    return tempered(teacher, 1 + (max_temperature - 1) * privacy.unsqueeze(-1))


def noisy(logits: Tensor, scale: Tensor, uniforms: Tensor) -> Tensor:
    """log max(softmax(z) + Laplace(0, scale), 0), unnormalised; z itself where scale is 0. [C, V], [C] → [C, V].

    uniforms [C, U], U ≥ 1, of [0, 1): each row's seed. The same seeds give the same noise, but for rounding, on any
    device and in any chunk. What the noise takes below 0 is ruled out, so that a reverse KL is infinite there; a row of
    which nothing is left becomes NaN.
    """
    drawn = _spread(uniforms, logits.shape[-1]).to(logits.dtype) - 0.5
    laplace = -drawn.sign() * torch.log1p(-2 * drawn.abs())
    probabilities = (logits.softmax(-1) + scale.unsqueeze(-1) * laplace).clamp(min=0.0)
    noised = probabilities.masked_fill(logits == -math.inf, 0.0).log()
    return torch.where(scale.unsqueeze(-1) > 0, noised, logits)


def bridge(student: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
    """z_teacher + β z_student, without gradient: a target ∝ p q^β (Veto, arXiv 2601.07155). Both [C, V] → [C, V].

    β = 0: the teacher.

    >>> bridge(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 0.0]), beta=0.5)
    tensor([4., 1.])
    """
    return teacher if beta == 0 else teacher + beta * student.detach()  # 0 · −inf is NaN


def _spread(seeds: Tensor, length: int) -> Tensor:
    """[C, U] numbers of [0, 1) → [C, length] numbers of (0, 1), as good as independent: a hash of row and column."""
    state = torch.zeros_like(seeds[:, 0], dtype=torch.int64)
    for column in seeds.unbind(-1):
        state = _mixed(state ^ (column.double() * 2**53).long())
    counter = torch.arange(1, length + 1, device=seeds.device)
    bits = _mixed(state.unsqueeze(-1) + counter)
    return ((bits & (2**23 - 1)) + 0.5) / 2**23  # 24 bits: exact in float32, and never 0 or 1


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64, whose products wrap; shifts bring in zeros."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _SECOND
    return x ^ ((x >> 31) & (2**33 - 1))


_LEAST_DEVIATION = 1e-7  # of the official code, which adds it and so is not quite invariant
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
