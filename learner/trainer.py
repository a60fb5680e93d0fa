"""One optimizer step, as the paper's algorithm box: mask, pack, forward, loss, backward, check, clip, step.

Everything between "a list of scored rollouts" and "a better student" for one process. Knows no Ray, no files, no
schedule of checkpoints, and no feature by name: what a method needs is in the objects it calls.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from learner.aggregation import Denominators, token_weights
from learner.logprobs import head_loss, id_logprobs, upcast
from learner.model import CausalModel, learning_rate, make_optimizer
from learner.objective import row_loss
from learner.packing import Packed, pack, plan_micro_batches
from learner.self_teacher import SelfTeacherModel
from learner.targets import targets, teacher_context, trainable
from potstill.config import RunConfig, SelfTeacher
from potstill.errors import AlignmentError, NonFinite
from potstill.types import BoolArray, IntArray, ScoredRollout, StepReport

Batch = Sequence[ScoredRollout]
Masks = Sequence[BoolArray]


class Trainer:
    """The student, its optimizer and, where the method wants one, its self-teacher."""

    def __init__(self, config: RunConfig, student: CausalModel) -> None:
        self.config = config
        self.student = student.eval()  # without dropout: the sampler has none, and a step must be reproducible
        self.optimizer = make_optimizer(student, config.optim)
        inside = isinstance(config.teacher, SelfTeacher) and config.objective.support == "full"
        self.teacher = SelfTeacherModel(config.teacher, student) if inside else None
        self.version = 0

    def step(self, batch: Batch, *, step: int, denominators: Denominators) -> StepReport:
        """Make optimizer step `step`, counted from 1, from the whole batch; the student becomes version `step`.

        Raises NonFinite before the optimizer moves when loss or gradient is; AlignmentError when the tokens that can be
        trained on are not those that the denominators were made for.
        """
        started = time.perf_counter()
        masks = [trainable(scored, self.config.objective) for scored in batch]
        tokens, sequences = sum(int(mask.sum()) for mask in masks), sum(bool(mask.any()) for mask in masks)
        if (tokens, sequences) != (denominators.num_loss_tokens, denominators.num_sequences):
            raise AlignmentError(
                f"step {step} holds {tokens} tokens of {sequences} sequences to train on; "
                f"its denominators are {denominators}"
            )
        sums = self.accumulate(batch, masks, denominators)
        loss = sums.pop("loss")
        grad_norm = self._move(step, loss)
        metrics = {name: total / denominators.num_loss_tokens for name, total in sums.items()}
        metrics |= {"loss": loss, "grad_norm": grad_norm, "lr": self.optimizer.param_groups[0]["lr"]}
        return StepReport(step=step, metrics=metrics, seconds={"train": time.perf_counter() - started})

    def accumulate(self, batch: Batch, masks: Masks, denominators: Denominators) -> dict[str, float]:
        """Forward and backward, micro-batch by micro-batch: the loss, and each metric's sum over the loss tokens."""
        sums: dict[str, float] = defaultdict(float)
        self.optimizer.zero_grad(set_to_none=True)
        lengths = [self._num_tokens(scored) for scored in batch]
        for indices in plan_micro_batches(lengths, max_tokens=self.config.learner.micro_batch_tokens):
            kept = [i for i in sorted(indices) if masks[i].any()]
            if not kept:
                continue
            loss, metrics = self._loss([batch[i] for i in kept], [masks[i] for i in kept], denominators)
            loss.backward()  # type: ignore[no-untyped-call]
            for name, total in {"loss": loss.detach(), **metrics}.items():
                sums[name] += total.item()
        return sums

    def _loss(self, part: Batch, masks: Masks, denominators: Denominators) -> tuple[Tensor, Mapping[str, Tensor]]:
        objective = self.config.objective
        weights = token_weights(
            [int(mask.sum()) for mask in masks], aggregation=objective.aggregation, denominators=denominators
        )
        hidden = self.student(_packed(part, masks, [scored.rollout.prompt_ids for scored in part]))
        read = targets(part, masks, objective, hidden.device, self._teacher_logits(part, masks))
        return head_loss(
            hidden,
            self.student.head,
            row_loss(objective, read),
            weights=weights.to(hidden.device),
            chunk_tokens=self.config.learner.chunk_tokens,
        )

    def _teacher_logits(self, part: Batch, masks: Masks) -> Callable[[slice], Tensor] | None:
        """The self-teacher's logits, a chunk of rows at a time: its states are kept, its logits never."""
        if self.teacher is None:
            return None
        hidden = self.teacher.hidden(_packed(part, masks, [teacher_context(scored.rollout) for scored in part]))
        head = self.teacher.head
        return lambda rows: upcast(hidden[rows] @ head.T)

    def teacher_logprobs(self, scored: ScoredRollout) -> list[float] | None:
        """The self-teacher's log-prob of every completion token, for people to look at; None without a self-teacher."""
        if self.teacher is None:
            return None
        rollout = scored.rollout
        hidden = self.teacher.hidden(_packed([scored], [np.ones_like(rollout.loss_mask)], [teacher_context(rollout)]))
        written = torch.from_numpy(rollout.completion_ids).long().to(hidden.device).unsqueeze(-1)
        found = id_logprobs(hidden, self.teacher.head, written, chunk_tokens=self.config.learner.chunk_tokens)
        return [float(value) for value in found.squeeze(-1)]

    def _move(self, step: int, loss: float) -> float:
        """Clip, check, step. Returns the gradient's norm before clipping."""
        trained = [p for p in self.student.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, self.config.optim.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFinite(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights are still those of step {step - 1}"
            )
        lr = learning_rate(self.config.optim, step=step, steps=self.config.loop.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.teacher is not None:
            self.teacher.follow()
        self.version = step
        return grad_norm

    def _num_tokens(self, scored: ScoredRollout) -> int:
        """Packed tokens of the longer of the two views, which are in memory together."""
        rollout = scored.rollout
        views = [rollout.prompt_ids] + ([teacher_context(rollout)] if self.teacher is not None else [])
        return max(len(view) for view in views) + len(rollout.completion_ids) - 1


def _packed(part: Batch, masks: Masks, contexts: Sequence[IntArray]) -> Packed:
    return pack(contexts, [scored.rollout.completion_ids for scored in part], masks)
