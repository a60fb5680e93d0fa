"""A judge that learns beside the student to tell its text from that of others (GAD, arXiv 2511.10643).

    D(x, y) = w · h(x, y)                                         h: the last state of the last token of y, in float32
    L_D     = mean over the student's answers y of −log σ(D(x, y') − D(x, y))        y': the other answer to x

The student's reward is D(x, y) as it was when the step began; D then learns from the same text, once. Neither whitens
nor bounds a score: a constant added to D changes neither its loss nor an advantage, so the head has no bias.

Refuses to learn from a prompt without answers of the student, or without exactly one of others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from learner.logprobs import accumulator
from learner.model import CausalModel, make_optimizer
from learner.moments import load_moments, moments
from learner.packing import pack, plan_micro_batches
from learner.pairs import bradley_terry
from learner.ranks import Alone
from potstill.algebra import judges
from potstill.config import RunConfig
from potstill.errors import AlignmentError, ConfigError, NonFinite
from potstill.types import Rollout, ScoredRollout

_HEAD = "discriminator_head"


class Discriminator:
    """The student as the run found it, with a scalar head, trained by its own AdamW.

    It runs through the student's own network, as a moving average does: it holds a copy of what is trained of the
    student in float32 (all weights but the output head, or an adapter), its gradient while it learns, and two moments.
    With all weights trained that is 16 bytes a parameter; what a LoRA run leaves frozen is shared.
    """

    def __init__(self, student: CausalModel, config: RunConfig, choice: judges.Discriminator) -> None:
        self._student = student
        self._max_tokens = config.learner.micro_batch_tokens
        self._max_grad_norm = choice.max_grad_norm
        self.weights = {
            name: parameter.detach().to(accumulator(parameter.dtype), copy=True).requires_grad_()
            for name, parameter in _body(student)
        }
        self.weights[_HEAD] = _head(student, seed=config.seed)
        self._optimizer = make_optimizer(self.weights.values(), config.optim.model_copy(update={"lr": choice.lr}))

    @torch.no_grad()
    def rewards(self, batch: Sequence[ScoredRollout]) -> list[float]:
        """D of every completion, the others' too. Raises NonFinite for a score that is not a number."""
        found = torch.full((len(batch),), math.nan, dtype=torch.float64)
        for indices in self._micro_batches(batch):
            found[indices] = self.scores([batch[i].rollout for i in indices]).double().cpu()
        if not bool(found.isfinite().all()):
            raise NonFinite("discriminator: a score is not finite; lower objective.judge.lr")
        return found.tolist()

    def learn(self, batch: Sequence[ScoredRollout]) -> dict[str, float]:
        """One step. Metrics are of the scores before it. Raises AlignmentError for a prompt that has not both sides and
        NonFinite where score or gradient is, before it moves.

        The loss is of whole prompts, whose texts may not fit into one micro-batch: its slopes at the present scores are
        taken first, then each text follows its own.
        """
        students, others = _paired(batch)
        scores = torch.tensor(self.rewards(batch), dtype=torch.float64, requires_grad=True)
        loss = bradley_terry(scores[others], scores[students]).mean()
        slopes = torch.autograd.grad(loss, scores)[0]
        self._optimizer.zero_grad(set_to_none=True)
        for indices in self._micro_batches(batch):
            own = self.scores([batch[i].rollout for i in indices])
            (slopes[indices].to(own) * own).sum().backward()  # type: ignore[no-untyped-call]
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self._max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise NonFinite(f"discriminator: loss {loss.item()}, gradient norm {grad_norm}; it has not moved")
        self._optimizer.step()
        found = scores.detach()
        return {
            "discriminator_loss": loss.item(),
            "discriminator_accuracy": (found[others] > found[students]).double().mean().item(),
            "reward_student": found[students].mean().item(),
            "reward_others": found[others].mean().item(),
        }

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[S] D of each completion after its own prompt, with gradient, in one forward pass."""
        completions = [np.append(rollout.completion_ids, 0) for rollout in rollouts]  # nothing reads what is predicted
        ends = [np.arange(len(completion)) == len(completion) - 1 for completion in completions]
        packed = pack([rollout.prompt_ids for rollout in rollouts], completions, ends)
        body = {name: self.weights[name].to(parameter.dtype) for name, parameter in _body(self._student)}
        hidden: Tensor = functional_call(self._student, body, (packed,))
        return hidden.to(self.weights[_HEAD].dtype) @ self.weights[_HEAD]

    def state(self) -> dict[str, Tensor]:
        """Weights, and the optimizer's moments of each."""
        weights = {f"{name}/weight": weight.detach().cpu().contiguous() for name, weight in self.weights.items()}
        return weights | moments(self._optimizer, self.weights, Alone())

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises ConfigError when it is another run's."""
        kept = {key.removesuffix("/weight"): value for key, value in state.items() if key.endswith("/weight")}
        if kept.keys() != self.weights.keys():
            raise ConfigError("the checkpoint's judge is not this run's; continue with the config that wrote it")
        for name, weight in self.weights.items():
            weight.copy_(kept[name])
        rest = {key: value for key, value in state.items() if not key.endswith("/weight")}
        load_moments(self._optimizer, self.weights, rest, Alone())

    def _micro_batches(self, batch: Sequence[ScoredRollout]) -> list[list[int]]:
        lengths = [len(scored.rollout.prompt_ids) + len(scored.rollout.completion_ids) for scored in batch]
        return plan_micro_batches(lengths, max_tokens=self._max_tokens)


def _body(student: CausalModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What is trained of the student and read on the way to its last states: an output head of its own is not."""
    embedding = student.transformer.get_input_embeddings().weight
    return (
        (name, parameter)
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and (parameter is not student.head or parameter is embedding)
    )


def _head(student: CausalModel, *, seed: int) -> Tensor:
    """[D] of variance 1/D, so that first scores are of the size of a state's components."""
    width = student.head.shape[1]
    drawn = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width)
    return drawn.to(student.head.device, accumulator(student.head.dtype)).requires_grad_()


def _paired(batch: Sequence[ScoredRollout]) -> tuple[list[int], list[int]]:
    """Indices of the student's answers [P], and beside each the one that others gave to its prompt [P]."""
    by_prompt: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, scored in enumerate(batch):
        by_prompt[scored.rollout.prompt_id][scored.rollout.origin].append(index)
    students, others = [], []
    for prompt, found in by_prompt.items():
        if found.keys() != {"student", "others"} or len(found["others"]) != 1:
            counted = ", ".join(f"{len(indices)} of {origin!r}" for origin, indices in sorted(found.items()))
            raise AlignmentError(
                f"a discriminator compares the student's answers with one of others: prompt {prompt!r} has {counted}"
            )
        students += found["student"]
        others += found["others"] * len(found["student"])
    return students, others
