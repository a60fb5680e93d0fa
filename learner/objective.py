"""A point of the algebra, made into a row loss: which outcomes, which divergence, what is measured beside it.

Reads an Objective (potstill/methods.py) and the step's targets; returns what logprobs.head_loss wants. Rows whose
targets are NaN must have been left out before: this file never masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from learner.divergences import entropy, forward_kl, jsd, reverse_kl
from learner.estimators import negative_log_likelihood, sampled_reverse_kl
from learner.logprobs import RowLoss
from learner.supports import outcomes, with_bucket
from potstill.errors import NonFinite
from potstill.methods import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the teacher and the sampler said of N loss tokens. A field that the objective does not read is None.

    Example for N=1, K=2: token_ids [50], behaviour [-0.4], teacher [-0.1], support_ids [[50, 53]],
    teacher_support [[-0.1, -3.0]], teacher_rest [-2.9].
    """

    token_ids: Tensor  # [N] the written tokens
    behaviour: Tensor | None = None  # [N] sampler's log-probs of them
    teacher: Tensor | None = None  # [N] teacher's log-probs of them
    support_ids: Tensor | None = None  # [N, K]
    teacher_support: Tensor | None = None  # [N, K] teacher's log-probs of support_ids
    teacher_rest: Tensor | None = None  # [N] log of the teacher's mass outside support_ids
    teacher_logits: Callable[[slice], Tensor] | None = None  # rows → [C, V], for a teacher inside the learner


def row_loss(objective: Objective, targets: Targets) -> RowLoss:
    """The objective over these targets. Raises ValueError when one that it reads is missing, NonFinite for a NaN."""
    require(objective, targets)
    if objective.support == "sampled":
        return _sampled(objective, targets)
    return _divergence(objective, targets)


def require(objective: Objective, targets: Targets) -> None:
    """Every target that the objective reads is there and none is NaN (a teacher's log-prob may be −inf)."""
    reads = {
        "sampled": () if objective.divergence == "nll" else ("behaviour", "teacher"),
        "student_topk": ("support_ids", "teacher_support", "teacher_rest"),
        "teacher_topk": ("support_ids", "teacher_support", "teacher_rest"),
        "full": ("teacher_logits",),
    }[objective.support]
    for name in reads:
        value = getattr(targets, name)
        if value is None:
            raise ValueError(f"support {objective.support!r} reads targets.{name}, which is missing")
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
            raise NonFinite(f"targets.{name} holds NaN: leave unscored rows out before the loss")


def _sampled(objective: Objective, targets: Targets) -> RowLoss:
    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        logq = logits.log_softmax(-1)
        written = logq.gather(-1, targets.token_ids[rows, None]).squeeze(-1)
        metrics = {"entropy": entropy(logq.detach())}
        if objective.divergence == "nll":
            return negative_log_likelihood(written), metrics
        behaviour, teacher = _rows(targets.behaviour, rows), _rows(targets.teacher, rows)
        metrics["reverse_kl"] = written.detach() - teacher
        metrics["ratio_mean"] = (written.detach() - behaviour).exp()
        return sampled_reverse_kl(written, teacher, behaviour, ratio_cap=objective.ratio_cap), metrics

    return loss


def _divergence(objective: Objective, targets: Targets) -> RowLoss:
    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        if objective.support == "full":
            assert targets.teacher_logits is not None
            student = logits.log_softmax(-1)
            teacher = targets.teacher_logits(rows).log_softmax(-1)
            student_entropy = entropy(student.detach())
        else:
            student = outcomes(logits, _rows(targets.support_ids, rows))
            teacher = with_bucket(_rows(targets.teacher_support, rows), _rows(targets.teacher_rest, rows))
            student_entropy = entropy(logits.detach().log_softmax(-1))
        metrics = {"entropy": student_entropy, "reverse_kl": reverse_kl(student.detach(), teacher)}
        if objective.support != "full":
            metrics["captured_mass"] = 1 - student[..., -1].detach().exp()
        return _measure(objective, student, teacher), metrics

    return loss


def _measure(objective: Objective, student: Tensor, teacher: Tensor) -> Tensor:
    if objective.divergence == "forward_kl":
        return forward_kl(student, teacher, pointwise_clip=objective.pointwise_clip)
    if objective.divergence == "jsd":
        assert objective.beta is not None
        return jsd(student, teacher, beta=objective.beta)
    return reverse_kl(student, teacher)


def _rows(values: Tensor | None, rows: slice) -> Tensor:
    assert values is not None, "checked by require()"
    return values[rows]


__all__ = ["Targets", "require", "row_loss"]
