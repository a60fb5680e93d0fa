"""Small runs of every kind of state, and their checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from learner import checkpoint
from learner.model import load_student
from learner.trainer import Trainer
from potstill.fencing import Fence
from tests.rollouts import random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import SELF_TEACHER, VOCABULARY, make_config, take_step

LORA = {"rank": 2, "alpha": 4.0}
RUNS: dict[str, dict[str, Any]] = {
    "all weights": {"method": "opd", "objective": {"support": {"k": 3}}},
    "adapter": {"method": "opd", "objective": {"support": {"k": 3}}, "student": {"lora": LORA}},
    "bfloat16": {"method": "opd_sampled", "student": {"dtype": "bfloat16"}, "optim": {"lr": 1e-4}},
    "frozen": {"method": "opsd", "teacher": SELF_TEACHER},
    "ema": {"method": "opsd", "teacher": {**SELF_TEACHER, "weights": "ema"}},
    "taid": {"method": "taid", "teacher": SELF_TEACHER},
    "adapter, ema": {"method": "opsd", "teacher": {**SELF_TEACHER, "weights": "ema"}, "student": {"lora": LORA}},
}


def save_students(folder: Path) -> Path:
    """A folder with two students, `untied` and `tied`."""
    save_tiny_model(folder / "untied", seed=0, hidden=32, layers=1)
    save_tiny_model(folder / "tied", seed=0, hidden=32, layers=1, tie_word_embeddings=True)
    return folder


def make_trainer(model: Path, **run: Any) -> Trainer:
    config = make_config(**{**run, "student": {"model": str(model), **run.get("student", {})}})
    return Trainer(config, load_student(config.student, seed=0, device=torch.device("cpu")))


def train(trainer: Trainer, first: int, last: int) -> Trainer:
    for step in range(first, last + 1):
        batch = random_batch([(3, 4), (1, 3)], vocabulary=VOCABULARY, seed=step)
        right = [dataclasses.replace(s, rollout=dataclasses.replace(s.rollout, reward=1.0)) for s in batch]
        take_step(trainer, right, step)
    return trainer


def write(captured: checkpoint.Captured, folder: Path, model: Path, *, fence: Fence | None = None) -> Path:
    """As the first attempt of a run that has no other, unless a fence says otherwise."""
    fence = fence or Fence(folder.parent, 1)
    tokenizer = checkpoint.tokenizer_files(model)
    return checkpoint.write(captured, folder, card="# A student\n", tokenizer=tokenizer, extra={}, fence=fence)


def save(trainer: Trainer, folder: Path, model: Path, **extra: Any) -> Path:
    return checkpoint.save(trainer, folder, card="# A student\n", tokenizer=model, extra=extra)
