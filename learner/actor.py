"""The learner as a Ray actor: fetches references, calls the trainer, puts weights into the object store.

Thin on purpose: no maths, no decisions. One method call at a time. torch is imported in the actor's own process, so
that whoever launches it needs none.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from potstill.config import RunConfig, ScratchConfig
from potstill.types import Receipt, ScoredRollout, StepBatch, StepReport, WeightsVersion
from potstill.wire import Capabilities

if TYPE_CHECKING:
    from learner.trainer import Trainer


class Learner:
    """Holds one run's trainer at a time; `open` starts another run in the same process."""

    def __init__(self) -> None:
        from learner import canaries, checkpoint, scratch

        self._canaries, self._checkpoint, self._scratch = canaries, checkpoint, scratch
        self._trainer: Trainer | None = None

    def open(self, config: RunConfig, met: Capabilities | None) -> WeightsVersion:
        """Load the student and publish it as version 0. Raises ConfigError when it cannot be loaded.

        met  what the teacher offers that scores from outside, where one does
        """
        import torch

        from learner.model import load_student
        from learner.sent_states import SentStates
        from learner.trainer import Trainer

        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        student = load_student(config.student, seed=config.seed, device=device)
        self._trainer = Trainer(config, student, SentStates.of(config, met, student))
        return self.publish()

    def create(self, folder: str, architecture: ScratchConfig, texts: list[str], seed: int) -> None:
        """Write a model folder from nothing, replacing what is there."""
        shutil.rmtree(folder, ignore_errors=True)
        self._scratch.create(Path(folder), architecture, texts=texts, seed=seed)

    def check(self, batch: StepBatch, num_rollouts: int) -> dict[str, float]:
        """The canaries, on the first rollouts of the first batch."""
        return self._canaries.check(self.trainer, _fetch(batch.receipts[:num_rollouts]))

    def step(self, batch: StepBatch) -> StepReport:
        from learner.aggregation import Denominators

        denominators = Denominators(num_loss_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences)
        return self.trainer.step(_fetch(batch.receipts), step=batch.step, denominators=denominators)

    def validate(self, receipts: Sequence[Receipt]) -> float:
        return self.trainer.validate(_fetch(receipts))

    def annotate(self, receipts: Sequence[Receipt]) -> list[list[float] | None]:
        """Per rollout, the self-teacher's log-prob of every token; None without a self-teacher."""
        return [self.trainer.teacher_logprobs(scored) for scored in _fetch(receipts)]

    def publish(self) -> WeightsVersion:
        """The current weights as a version whose payload lies in the object store."""
        from learner.publish import snapshot

        version, payload = snapshot(self.trainer.student, version=self.trainer.version)
        return dataclasses.replace(version, payload=ray.put(payload))

    def save(self, folder: str, card: str, tokenizer: str, extra: Mapping[str, Any], keep: int) -> None:
        path = Path(folder)
        self._checkpoint.save(self.trainer, path, card=card, tokenizer=Path(tokenizer), extra=extra)
        self._checkpoint.prune(path.parent, keep=keep)

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("open a run first")
        return self._trainer


def _fetch(receipts: Sequence[Receipt]) -> list[ScoredRollout]:
    """The rollouts behind the receipts, each bundle fetched once."""
    bundles = {receipt.bundle: None for receipt in receipts}
    fetched = dict(zip(bundles, ray.get(list(bundles)), strict=True))
    return [fetched[receipt.bundle][receipt.position] for receipt in receipts]
