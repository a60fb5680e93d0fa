"""The student's own weights as its teacher, reading a privileged prompt. Nothing travels; nothing here has a gradient.

frozen  the student as the run found it: a copy, or the student with its adapter switched off
ema     θ' ← d·θ' + (1 − d)·θ after every step
live    the current student
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from learner.model import CausalModel
from learner.packing import Packed
from potstill.config import SelfTeacher


class SelfTeacherModel:
    """Logits of the teacher's view, chunk by chunk.

    A copy is made only where its weights will differ from the student's: frozen without an adapter, and ema.
    """

    def __init__(self, config: SelfTeacher, student: CausalModel) -> None:
        self._config = config
        self._student = student
        self._adapted = student.network is not student.transformer
        needs_copy = config.weights == "ema" or (config.weights == "frozen" and not self._adapted)
        self._copy = copy.deepcopy(student).requires_grad_(False).eval() if needs_copy else None

    @torch.no_grad()
    def hidden(self, packed: Packed) -> Tensor:
        """[M, D] states of the teacher's view, in the order of the student's loss tokens."""
        with self._switched():
            return self._model(packed)

    @property
    def head(self) -> Tensor:
        return self._model.head.detach()

    @torch.no_grad()
    def follow(self) -> None:
        """After the optimizer moved: ema takes its step; the others have nothing to do."""
        if self._config.weights != "ema" or self._copy is None:
            return
        for own, students in zip(self._copy.parameters(), self._student.parameters(), strict=True):
            own.lerp_(students, 1 - self._config.ema_decay)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep to continue: the copy, where there is one. Tied weights once."""
        return {} if self._copy is None else {name: p.detach() for name, p in self._copy.network.named_parameters()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        if self._copy is None:
            return
        for name, parameter in self._copy.network.named_parameters():
            parameter.copy_(state[name])

    @property
    def _model(self) -> CausalModel:
        return self._student if self._copy is None else self._copy

    def _switched(self) -> AbstractContextManager[None]:
        """Frozen with an adapter is the student with its adapter off."""
        if self._config.weights == "frozen" and self._adapted:
            return self._student.network.disable_adapter()  # type: ignore[operator, no-any-return]
        return nullcontext()
