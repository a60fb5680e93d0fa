"""One optimizer step, as the paper's algorithm box: mask, pack, forward, loss, backward, check, clip, step.

Everything between "a list of scored rollouts" and "a better student". Knows no Ray, no files, no schedule of
checkpoints, and no feature by name: what a method needs is in the objects it calls. Of several ranks each is given the
whole list, and every verb is called on all; what is settled for a whole step each settles for itself, in the same way.
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
from learner.credit import credit, tied
from learner.facts import Facts, Moment
from learner.inner_teacher import InnerModels, InnerTeacher
from learner.judge import judge_of
from learner.logprobs import Tally, head_loss, id_logprobs
from learner.masters import Masters
from learner.model import CausalModel, learning_rate, make_optimizer
from learner.nearness import near_of
from learner.objective import OF_TEACHER, row_loss
from learner.packing import pack, plan_micro_batches, share
from learner.schedules import Schedules
from learner.sent_states import SentStates
from learner.targets import budgeted, check_ids, gather, trainable
from learner.weighing import weighing_of
from potstill.config import RunConfig
from potstill.errors import AlignmentError, NonFinite, SignalLost
from potstill.types import BoolArray, ScoredRollout, StepReport

Batch = Sequence[ScoredRollout]
Masks = Sequence[BoolArray]


class Trainer:
    """The student, its optimizer and, where the method wants them, models beside it and schedules.

    sent  the teacher where it is a server that sends its states
    """

    def __init__(self, config: RunConfig, student: CausalModel, sent: SentStates | None = None) -> None:
        self.config = config
        self.student = student.eval()  # without dropout: the sampler has none, and a step must be reproducible
        self.masters = Masters(student)
        self.optimizer = make_optimizer(self.masters.weights.values(), config.optim)
        self.inner = InnerModels.beside(student, config)
        self.teacher: SentStates | InnerTeacher | None = sent or self.inner.teacher  # whose every logit is at hand
        self.judge = judge_of(student, config)
        self.near = near_of(student, self.teacher, config)
        self.weighing = weighing_of(self.inner.teacher, config, student.head.device)
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
        tally = self._whole(batch, masks, step=step)
        losses = {name: loss.item() for name, loss in tally.losses.items()}
        loss = sum(losses.values())
        learnt = self.judge.learn(batch)
        grad_norm = self._move(step, loss)
        self.schedules.observe(step, losses)
        metrics = _means(tally)
        metrics |= {f"loss_{name}": value for name, value in losses.items()} if len(losses) > 1 else {}
        metrics |= {"loss": loss, "grad_norm": grad_norm, "lr": self.optimizer.param_groups[0]["lr"]}
        metrics |= learnt | self.weighing.learn(batch, masks)
        return StepReport(step=step, metrics=metrics, seconds={"train": time.perf_counter() - started})

    @torch.no_grad()
    def validate(self, batch: Batch) -> float:
        """The objective on text that nothing is learnt from; in nats a token where it averages over tokens.

        What changes with the step is as in the step that comes next. Raises NonFinite when the loss is.
        """
        tally = self._whole(batch, self.masks(batch), step=self.version + 1)
        loss = sum(loss.item() for loss in tally.losses.values())
        if not math.isfinite(loss):
            raise NonFinite(f"after step {self.version} the loss of the held-out text is {loss}")
        return loss

    def _whole(self, batch: Batch, masks: Masks, *, step: int) -> Tally:
        """What a whole step adds up to, within its budget. Raises SignalLost when no token counts."""
        masks = budgeted(batch, masks, self.config.objective, step=step)
        tally = self.accumulate(batch, masks, totals(batch, masks), step=step)
        if not tally.losses:
            raise SignalLost(f"step {step}: every token counts for nothing; what closed the objective's gates?")
        return tally

    def accumulate(self, batch: Batch, masks: Masks, denominators: Mapping[str, Denominators], *, step: int) -> Tally:
        """Forward and backward, micro-batch by micro-batch: losses and measures of a step, or of a part of it.

        denominators  of the whole step, by what a term is over (see `totals`). All completions of a prompt are here;
                      a gate "pass_rate" scales its weights to the part it sees, so it wants the whole step.

        Each rank passes over its share; losses and measures are everybody's, gradients are summed.
        """
        objective, ranks = self.config.objective, self.student.ranks
        earned = credit(batch, masks, objective, judge=self.judge, near=self.near)
        moment = Moment(step=step, steps=self.config.loop.steps, schedule=self.schedules.values())
        tally, whole = Tally(), Tally()
        whole.add({}, tied(earned))
        self.optimizer.zero_grad(set_to_none=True)
        for indices, own in self._passes(batch, masks):
            part, rollouts = [batch[i] for i in indices], [batch[i].rollout for i in indices]
            rewards = {name: [values[i] for i in indices] for name, values in earned.items()}
            hidden = self.student(pack([r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts], own))
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
        ranks.settle(self.student)
        whole.merge(ranks.total(tally))
        return whole

    def teacher_logprobs(self, scored: ScoredRollout) -> list[float] | None:
        """The inner teacher's log-prob of every completion token, for people to look at; None without one."""
        teacher = self.inner.teacher
        if teacher is None:
            return None
        rollout = scored.rollout
        everywhere = np.ones_like(rollout.loss_mask)
        written = torch.from_numpy(rollout.completion_ids[:, None]).long().to(self.student.head.device)
        logits = teacher.read([scored], [everywhere])
        found: list[float] = id_logprobs(logits, written, chunk_tokens=self.config.learner.chunk_tokens)[:, 0].tolist()
        self.student.ranks.settle(self.student)
        return found

    def _facts(
        self, part: Batch, masks: Masks, hidden: torch.Tensor, *, step: int, rewards: Mapping[str, Sequence[float]]
    ) -> Facts:
        """All that is known before the loss: what travelled, what the models beside the student say, and a look."""
        objective, teacher, reference = self.config.objective, self.teacher, self.inner.reference
        inside = teacher is not None
        facts = gather(part, masks, objective, device=hidden.device, step=step, inside=inside, rewards=rewards)
        ahead = partial(ReadAhead, num_rows=len(facts.token_ids), window=self.config.learner.chunk_tokens)
        if teacher is not None:
            facts = dataclasses.replace(facts, teacher_logits=ahead(teacher.read(part, masks)))
        if reference is not None:
            facts = dataclasses.replace(facts, reference_logits=ahead(reference.read(part, masks)))
        if look.needed(objective, inside=inside):
            facts = look.look(facts, hidden, self.student.head, chunk_tokens=self.config.learner.chunk_tokens)
        return facts

    def _move(self, step: int, loss: float) -> float:
        """Clip, check, step. Returns the gradient's norm before clipping."""
        total_norm = self.student.ranks.norm(self.masters.gradients())
        torch.nn.utils.clip_grads_with_norm_(self.masters.weights.values(), self.config.optim.max_grad_norm, total_norm)
        grad_norm = total_norm.item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFinite(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights are still those of step {step - 1}"
            )
        lr = learning_rate(self.config.optim, step=step, steps=self.config.loop.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.masters.settle()
        self.inner.follow()
        self.version = step
        return grad_norm

    def _passes(self, batch: Batch, masks: Masks) -> list[tuple[list[int], Masks]]:
        """What this rank passes over: indices into the batch, and the loss tokens of each.

        Ranks meet in every pass: where another has one more, the shortest text without a loss token fills it.
        """
        plans = self._micro_batches(batch, masks)
        own: list[tuple[list[int], Masks]] = [
            (indices, [masks[i] for i in indices]) for indices in plans[self.student.ranks.rank]
        ]
        shortest = min(range(len(batch)), key=lambda i: self._num_tokens(batch[i]))
        idle: tuple[list[int], Masks] = ([shortest], [np.zeros_like(masks[shortest])])
        return own + [idle] * (max(map(len, plans)) - len(own))

    def _micro_batches(self, batch: Batch, masks: Masks) -> list[list[list[int]]]:
        """Of each rank, without text that has no loss token; completions that a term compares stay together."""
        paired = self.config.objective.compares_completions
        groups: dict[object, list[int]] = defaultdict(list)
        for index, scored in enumerate(batch):
            groups[scored.rollout.prompt_id if paired else index].append(index)
        members = list(groups.values())
        lengths = [sum(self._num_tokens(batch[i]) for i in indices) for indices in members]
        plans = []
        for own in share(lengths, num_ranks=self.student.ranks.size):
            plan = plan_micro_batches([lengths[g] for g in own], max_tokens=self.config.learner.micro_batch_tokens)
            filled = [sorted(i for g in part for i in members[own[g]] if masks[i].any()) for part in plan]
            plans.append([indices for indices in filled if indices])
        return plans

    def _num_tokens(self, scored: ScoredRollout) -> int:
        """Packed tokens of the longer of the two views, which are in memory together."""
        rollout, teacher = scored.rollout, self.inner.teacher
        views = [rollout.prompt_ids] + ([] if teacher is None else [teacher.context(rollout)])
        return max(len(view) for view in views) + len(rollout.completion_ids) - 1


def _means(tally: Tally) -> dict[str, float]:
    """The measures of the step; those of one teacher are left out where it scored everything."""
    means = {name: total.item() / tally.counts[name] for name, total in tally.sums.items()}
    by_teacher = [name for name in means if name.startswith(OF_TEACHER)]
    return {name: mean for name, mean in means.items() if len(by_teacher) > 1 or name not in by_teacher}


def totals(batch: Batch, masks: Masks) -> dict[str, Denominators]:
    """Denominators of a step by what a term is over."""
    return subsets([int(mask.sum()) for mask in masks], [scored.rollout.origin for scored in batch])
