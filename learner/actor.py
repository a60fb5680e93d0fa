"""The learner as a Ray actor: fetches references, calls the trainer, puts weights into the object store.

Thin on purpose: no maths, no decisions. One method call at a time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from learner import canaries, checkpoint, scratch
from learner.aggregation import Denominators
from learner.model import load_student
from learner.publish import snapshot
from learner.trainer import Trainer
from potstill.config import RunConfig, ScratchConfig
from potstill.types import Receipt, ScoredRollout, StepBatch, StepReport, WeightsVersion


class Learner:
    """Holds one run's trainer at a time; `open` starts another run in the same process."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._trainer: Trainer | None = None

    def open(self, config: RunConfig) -> WeightsVersion:
        """Load the student and publish it as version 0. Raises ConfigError when it cannot be loaded."""
        torch.manual_seed(config.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._trainer = Trainer(config, load_student(config.student, seed=config.seed, device=device))
        return self.publish()

    def create(self, folder: str, architecture: ScratchConfig, texts: list[str], seed: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        scratch.create(Path(folder), architecture, texts=texts, seed=seed)

    def check(self, batch: StepBatch, num_rollouts: int) -> dict[str, float]:
        """The canaries, on the first rollouts of the first batch."""
        return canaries.check(self.trainer, _fetch(batch.receipts[:num_rollouts]))

    def step(self, batch: StepBatch) -> StepReport:
        return self.trainer.step(
            _fetch(batch.receipts),
            step=batch.step,
            denominators=Denominators(num_loss_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences),
        )

    def publish(self) -> WeightsVersion:
        """The current weights as a version whose payload lies in the object store."""
        version, payload = snapshot(self.trainer.student, version=self.trainer.version)
        return dataclasses.replace(version, payload=ray.put(payload))

    def save(self, folder: str, card: str, tokenizer: str, extra: Mapping[str, Any], keep: int) -> None:
        path = Path(folder)
        checkpoint.save(self.trainer, path, card=card, tokenizer=Path(tokenizer), extra=extra)
        checkpoint.prune(path.parent, keep=keep)

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
