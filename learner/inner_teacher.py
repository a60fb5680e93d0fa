"""Models inside the learner, where every logit is at hand: the student's own weights, or models loaded beside it.

frozen        the student as the run found it: a copy of what is trained, or the student with its adapter switched off
ema           θ' ← d·θ' + (1 − d)·θ after every step
live          the current student; no memory
trust_region  logits (1 − α)·frozen + α·live: the normalised geometric mean of the two (SDPO, arXiv 2601.20802)
local         other models from folders, averaged where several score the same token

Nothing here travels, and nothing has a gradient.

Legend: S sequences, M loss tokens, V vocabulary, D states, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from learner.ensemble import average_of_logits, average_of_probabilities, routed
from learner.facts import Logits
from learner.logprobs import accumulator, upcast
from learner.model import CausalModel, load_transformer
from learner.packing import Packed, pack
from learner.targets import teacher_context
from potstill.config import RunConfig
from potstill.config_teachers import LocalModel, LocalTeacher, SelfTeacher
from potstill.errors import ConfigError
from potstill.types import BoolArray, IntArray, Rollout, ScoredRollout

See = Callable[[Packed], tuple[Tensor, Tensor]]
"""One model's view: packed sequences → states [M, D] that predict their loss tokens, and the head [V, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerModels:
    """The models beside the student that a run reads. Each holds only what the student's memory does not."""

    teacher: InnerTeacher | None
    reference: InnerTeacher | None  # the student as the run found it
    average: MovingAverage | None  # of a teacher "ema": all that changes with the steps

    @classmethod
    def beside(cls, student: CausalModel, config: RunConfig) -> InnerModels:
        """Made before the first step, or before a checkpoint is restored: `student` is what the run's folder holds.

        A frozen teacher and the reference are one model. Raises ConfigError when a model cannot be loaded, or when it
        and the student differ in vocabulary.
        """
        found, live = cache(partial(_as_found, student)), partial(_as_it_is, student)
        members: list[Member] = []
        average = None
        match config.teacher if config.objective.reads_teacher else None:
            case LocalTeacher(models=models):
                members = [_loaded(one, student) for one in models]
            case SelfTeacher(weights="frozen"):
                members = [Member(see=found())]
            case SelfTeacher(weights="live"):
                members = [Member(see=live)]
            case SelfTeacher(weights="trust_region", trust=trust):
                members = [Member(see=found(), weight=1 - trust), Member(see=live, weight=trust)]
            case SelfTeacher(weights="ema", ema_decay=decay):
                average = MovingAverage(student, decay=decay)
                members = [Member(see=average)]
        combine = config.teacher.combine if isinstance(config.teacher, LocalTeacher) else "logits"
        privileged = getattr(config.teacher, "privileged_template", None) is not None
        return cls(
            teacher=InnerTeacher(members, combine=combine, privileged=privileged) if members else None,
            reference=InnerTeacher([Member(see=found())]) if config.objective.reads_reference else None,
            average=average,
        )

    def follow(self) -> None:
        """After the optimizer moved: ema takes its step; the others have nothing to do."""
        if self.average is not None:
            self.average.follow()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: the moving average. All else is read from folders again."""
        return {} if self.average is None else self.average.state()

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises ConfigError when it is another run's."""
        if state.keys() != ({} if self.average is None else self.average.weights).keys():
            raise ConfigError("the checkpoint's teacher is not this run's; continue with the config that wrote it")
        if self.average is not None:
            self.average.load(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the models that make a teacher."""

    see: See
    weight: float = 1.0  # beside the others that score the same token: scaled there to sum to 1
    domains: tuple[str, ...] = ()  # that it scores; none: all


class InnerTeacher:
    """One model, or several as one: each token is scored by every member for its prompt's domain.

    privileged  it reads a prompt of its own
    """

    def __init__(self, members: Sequence[Member], *, combine: str = "logits", privileged: bool = False) -> None:
        self._members = tuple(members)
        self._average = average_of_probabilities if combine == "probabilities" else average_of_logits
        self._privileged = privileged

    @property
    def weights(self) -> tuple[float, ...]:
        """Of its members: given, or set last by `weigh`."""
        return tuple(member.weight for member in self._members)

    def weigh(self, weights: Sequence[float]) -> None:
        """Give each member another weight, for what is asked from now on."""
        self._members = tuple(
            replace(member, weight=weight) for member, weight in zip(self._members, weights, strict=True)
        )

    def apart(self) -> list[InnerTeacher]:
        """Each member as a teacher of its own, which reads what they read together."""
        return [InnerTeacher([member], privileged=self._privileged) for member in self._members]

    def context(self, rollout: Rollout) -> IntArray:
        """What it reads before the completion. Raises AlignmentError where its own prompt was not rendered."""
        return teacher_context(rollout, privileged=self._privileged)

    def read(self, part: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> Logits:
        """The logits of the rollouts' loss tokens, by row; see `logits`."""
        rollouts = [scored.rollout for scored in part]
        packed = pack([self.context(r) for r in rollouts], [r.completion_ids for r in rollouts], masks)
        return self.logits(packed, domains=[r.domain for r in rollouts])

    @torch.no_grad()
    def logits(self, packed: Packed, *, domains: Sequence[str]) -> Logits:
        """The logits of the [M] loss tokens of [S] sequences, by row; `domains` [S] of their prompts.

        Each member runs here, once, over the sequences that it scores: states are kept, logits never. Where members
        are averaged the logits are log-probs. Raises ConfigError for a domain that no member scores.
        """
        if len(domains) != len(packed.lengths):
            raise ValueError(f"{len(packed.lengths)} sequences, but {len(domains)} domains")
        chosen = [self._panel(domain) for domain in domains]
        panels = list(dict.fromkeys(chosen))
        views = {
            member: _view(self._members[member].see, packed, torch.tensor([member in panel for panel in chosen]))
            for member in sorted(set().union(*panels))
        }
        answers = [partial(self._averaged, {member: views[member] for member in panel}) for panel in panels]
        if len(answers) == 1:
            return answers[0]
        which = torch.tensor([panels.index(panel) for panel in chosen])[_sequences(packed)]
        return routed(answers, which.to(views[panels[0][0]].hidden.device))

    def _panel(self, domain: str) -> tuple[int, ...]:
        """The members that score a domain."""
        panel = tuple(i for i, member in enumerate(self._members) if not member.domains or domain in member.domains)
        if not panel:
            raise ConfigError(f"teacher.models: none scores domain {domain!r}; name it, or give one model no domains")
        return panel

    def _averaged(self, views: Mapping[int, View], rows: Tensor) -> Tensor:
        logits = [view.logits(rows) for view in views.values()]
        weights = [self._members[member].weight for member in views]
        return logits[0] if len(logits) == 1 else self._average(logits, [weight / sum(weights) for weight in weights])


class Copy:
    """The student at another time: the weights that are trained, run through the student's own network.

    Tied weights are held once; those that are not trained are the student's.
    """

    def __init__(self, student: CausalModel, *, widened: bool = False) -> None:
        self._student = student
        self.weights = {
            name: parameter.detach().to(accumulator(parameter.dtype) if widened else parameter.dtype, copy=True)
            for name, parameter in self._trained()
        }

    def __call__(self, packed: Packed) -> tuple[Tensor, Tensor]:
        return self._student.ranks.read(self._student, self.weights, packed)

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self._student.named_parameters() if p.requires_grad)


class MovingAverage(Copy):
    """Of the student's weights, in float32 when they are not: an average in bfloat16 rounds most small steps away.

    With an adapter it is the average of each of its two factors, not of their product.
    """

    def __init__(self, student: CausalModel, *, decay: float) -> None:
        super().__init__(student, widened=True)
        self._decay = decay

    @torch.no_grad()
    def follow(self) -> None:
        """weights ← decay · weights + (1 − decay) · the student's."""
        for name, parameter in self._trained():
            self.weights[name].lerp_(parameter.to(self.weights[name].dtype), 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        return self._student.ranks.whole(self.weights)

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self._student.ranks.lay(state[name], like=weight))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one model saw of a micro-batch."""

    hidden: Tensor  # [R, D] of the R ≤ M loss tokens that it scores
    head: Tensor  # [V, D]
    place: Tensor  # [M] i64, each loss token's row of `hidden`; anything where it scores none

    def logits(self, rows: Tensor) -> Tensor:
        """[C, V] in float32, of loss tokens [C] that it scores."""
        return upcast(self.hidden[self.place[rows]] @ self.head.T)


def _loaded(config: LocalModel, student: CausalModel) -> Member:
    """A model beside the student: on its device and in its dtype."""
    transformer = load_transformer(config.model, dtype=student.head.dtype, device=student.head.device)
    model = CausalModel(transformer, transformer).requires_grad_(False).eval()
    own, students = len(model.head), len(student.head)
    if own != students:
        raise ConfigError(
            f"teacher.models: {config.model!r} has a vocabulary of {own}, "
            f"the student {student.transformer.name_or_path!r} of {students}; they must be the same"
        )
    return Member(see=partial(_as_it_is, model), weight=config.weight, domains=config.domains)


def _as_found(student: CausalModel) -> See:
    """The student's present weights, for good."""
    adapted = student.network is not student.transformer
    return partial(_without_adapter, student) if adapted else Copy(student)


def _as_it_is(model: CausalModel, packed: Packed) -> tuple[Tensor, Tensor]:
    return model(packed), model.head


def _without_adapter(student: CausalModel, packed: Packed) -> tuple[Tensor, Tensor]:
    with student.network.disable_adapter():  # type: ignore[operator]
        return student(packed), student.head


def _view(see: See, packed: Packed, kept: Tensor) -> View:
    """Of the sequences that are kept, kept [S] bool."""
    scored = kept[_sequences(packed)]
    hidden, head = see(packed if bool(kept.all()) else _only(packed, kept))
    return View(hidden=hidden, head=head.detach(), place=(scored.cumsum(0) - 1).to(hidden.device))


def _sequences(packed: Packed) -> Tensor:
    """[M] the sequence of each loss token."""
    return torch.searchsorted(torch.tensor(packed.lengths).cumsum(0), packed.predicts, right=True)


def _only(packed: Packed, kept: Tensor) -> Packed:
    """The sequences that are kept, end to end again."""
    lengths = torch.tensor(packed.lengths)
    inside = kept.repeat_interleave(lengths)
    return Packed(
        input_ids=packed.input_ids[inside],
        position_ids=packed.position_ids[inside],
        lengths=tuple(lengths[kept].tolist()),
        predicts=(inside.cumsum(0) - 1)[packed.predicts[kept[_sequences(packed)]]],
    )
