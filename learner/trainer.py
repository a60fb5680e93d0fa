"""One optimizer step, as the paper's algorithm box: mask, pack, forward, loss, backward, check, clip, step.

Everything between "a list of scored rollouts" and "a better student" for one process. Knows no Ray, no files, no
schedule of checkpoints, and no feature by name: what a method needs is in the objects it calls.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from learner import look
from learner.aggregation import Denominators, subsets
from learner.chunk import ReadAhead
from learner.credit import credit
from learner.facts import Facts, Moment
from learner.inner_teacher import InnerModels
from learner.logprobs import Tally, head_loss
from learner.model import CausalModel, learning_rate, make_optimizer
from learner.objective import row_loss
from learner.packing import Packed, pack, plan_micro_batches
from learner.schedules import Schedules
from learner.targets import budgeted, check_ids, gather, teacher_context, trainable
from potstill.config import RunConfig
from potstill.errors import AlignmentError, NonFinite, SignalLost
from potstill.types import BoolArray, IntArray, ScoredRollout, StepReport

Batch = Sequence[ScoredRollout]
Masks = Sequence[BoolArray]


class Trainer:
    """The student, its optimizer and, where the method wants them, models beside it and schedules."""

    def __init__(self, config: RunConfig, student: CausalModel) -> None:
        self.config = config
        self.student = student.eval()  # without dropout: the sampler has none, and a step must be reproducible
        self.optimizer = make_optimizer(student, config.optim)
        self.inner = InnerModels.beside(student, config)
        self.schedules = Schedules(config.objective, steps=config.loop.steps)
        self.version = 0

    def masks(self, batch: Batch) -> list[BoolArray]:
        """Per rollout, [T] tokens that carry everything the objective reads."""
        for scored in batch:
            check_ids(scored, vocabulary=len(self.student.head))
        return [trainable(s, self.config.objective, inside=self.inner.teacher is not None) for s in batch]

    def step(self, batch: Batch, *, step: int, denominators: Denominators) -> StepReport:
        """Make optimizer step `step`, counted from 1, from the whole batch; the student becomes version `step`.

        Raises NonFinite before the optimizer moves when loss or gradient is; AlignmentError when the tokens that can be
        trained on are not those that the denominators were made for.
        """
        started = time.perf_counter()
        masks = self.masks(batch)
        tokens, sequences = sum(int(mask.sum()) for mask in masks), sum(bool(mask.any()) for mask in masks)
        if (tokens, sequences) != (denominators.num_loss_tokens, denominators.num_sequences):
            raise AlignmentError(
                f"step {step} holds {tokens} tokens of {sequences} sequences to train on; "
                f"its denominators are {denominators}"
            )
        masks = budgeted(batch, masks, self.config.objective, step=step)
        tally = self.accumulate(batch, masks, totals(batch, masks), step=step)
        losses = {name: loss.item() for name, loss in tally.losses.items()}
        if not losses:
            raise SignalLost(f"step {step}: every token counts for nothing; what closed the objective's gates?")
        loss = sum(losses.values())
        grad_norm = self._move(step, loss)
        self.schedules.observe(step, losses)
        metrics = {name: total.item() / tally.counts[name] for name, total in tally.sums.items()}
        metrics |= {f"loss_{name}": value for name, value in losses.items()} if len(losses) > 1 else {}
        metrics |= {"loss": loss, "grad_norm": grad_norm, "lr": self.optimizer.param_groups[0]["lr"]}
        return StepReport(step=step, metrics=metrics, seconds={"train": time.perf_counter() - started})

    def accumulate(self, batch: Batch, masks: Masks, denominators: Mapping[str, Denominators], *, step: int) -> Tally:
        """Forward and backward, micro-batch by micro-batch: losses and measures of a step, or of one rank's part of it.

        denominators  of the whole step, by what a term is over (see `totals`). All completions of a prompt are here;
                      a gate "pass_rate" scales its weights to the part it sees, so it wants the whole step.
        """
        objective = self.config.objective
        earned = credit(batch, masks, objective)
        moment = Moment(step=step, steps=self.config.loop.steps, schedule=self.schedules.values())
        tally = Tally()
        self.optimizer.zero_grad(set_to_none=True)
        for indices in self._micro_batches(batch):
            kept = [i for i in sorted(indices) if masks[i].any()]
            if not kept:
                continue
            part, own = [batch[i] for i in kept], [masks[i] for i in kept]
            rewards = {name: [values[i] for i in kept] for name, values in earned.items()}
            hidden = self.student(_packed(part, own, [scored.rollout.prompt_ids for scored in part]))
            facts = self._facts(part, own, hidden, step=step, rewards=rewards)
            loss, found = head_loss(
                hidden,
                self.student.head,
                row_loss(objective, facts, denominators=denominators, moment=moment),
                chunk_tokens=self.config.learner.chunk_tokens,
            )
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            tally.merge(found)
        return tally

    def teacher_logprobs(self, scored: ScoredRollout) -> list[float] | None:
        """The inner teacher's log-prob of every completion token, for people to look at; None without one."""
        teacher = self.inner.teacher
        if teacher is None:
            return None
        rollout = scored.rollout
        everywhere = np.ones_like(rollout.loss_mask)
        packed = _packed([scored], [everywhere], [self._teachers_prompt(scored)])
        logits = teacher.logits(packed, domains=[rollout.domain])
        rows = torch.arange(len(everywhere), device=self.student.head.device)
        written = torch.from_numpy(rollout.completion_ids).long().to(rows.device)
        found = [
            logits(part).log_softmax(-1).gather(-1, written[part, None]).squeeze(-1)
            for part in rows.split(self.config.learner.chunk_tokens)
        ]
        return [float(value) for value in torch.cat(found)]

    def _facts(
        self, part: Batch, masks: Masks, hidden: torch.Tensor, *, step: int, rewards: Mapping[str, Sequence[float]]
    ) -> Facts:
        """All that is known before the loss: what travelled, what the models beside the student say, and a look."""
        objective, inner = self.config.objective, self.inner
        facts = gather(
            part,
            masks,
            objective,
            device=hidden.device,
            step=step,
            inside=inner.teacher is not None,
            rewards=rewards,
        )
        domains = [scored.rollout.domain for scored in part]
        ahead = partial(ReadAhead, num_rows=len(facts.token_ids), window=self.config.learner.chunk_tokens)
        if inner.teacher is not None:
            packed = _packed(part, masks, [self._teachers_prompt(scored) for scored in part])
            facts = dataclasses.replace(facts, teacher_logits=ahead(inner.teacher.logits(packed, domains=domains)))
        if inner.reference is not None:
            packed = _packed(part, masks, [scored.rollout.prompt_ids for scored in part])
            facts = dataclasses.replace(facts, reference_logits=ahead(inner.reference.logits(packed, domains=domains)))
        if look.needed(objective, inside=inner.teacher is not None):
            facts = look.look(facts, hidden, self.student.head, chunk_tokens=self.config.learner.chunk_tokens)
        return facts

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
        self.inner.follow()
        self.version = step
        return grad_norm

    def _micro_batches(self, batch: Batch) -> list[list[int]]:
        """Indices into the batch; completions that a term compares with each other stay together."""
        paired = self.config.objective.compares_completions
        groups: dict[object, list[int]] = defaultdict(list)
        for index, scored in enumerate(batch):
            groups[scored.rollout.prompt_id if paired else index].append(index)
        members = list(groups.values())
        lengths = [sum(self._num_tokens(batch[i]) for i in indices) for indices in members]
        plan = plan_micro_batches(lengths, max_tokens=self.config.learner.micro_batch_tokens)
        return [[i for group in part for i in members[group]] for part in plan]

    def _teachers_prompt(self, scored: ScoredRollout) -> IntArray:
        template = getattr(self.config.teacher, "privileged_template", None)
        return teacher_context(scored.rollout, privileged=template is not None)

    def _num_tokens(self, scored: ScoredRollout) -> int:
        """Packed tokens of the longer of the two views, which are in memory together."""
        rollout = scored.rollout
        views = [rollout.prompt_ids] + ([self._teachers_prompt(scored)] if self.inner.teacher is not None else [])
        return max(len(view) for view in views) + len(rollout.completion_ids) - 1


def totals(batch: Batch, masks: Masks) -> dict[str, Denominators]:
    """Denominators of a step by what a term is over."""
    return subsets([int(mask.sum()) for mask in masks], [scored.rollout.origin for scored in batch])


def _packed(part: Batch, masks: Masks, contexts: Sequence[IntArray]) -> Packed:
    return pack(contexts, [scored.rollout.completion_ids for scored in part], masks)
