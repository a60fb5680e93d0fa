"""A checkpoint is complete and verified, or invisible.

    step-000123/
      model/          what transformers and vLLM load: config, safetensors, tokenizer, chat template, README.md
      adapter/        only with LoRA: the adapter alone, for peft
      trainer/        student, optimizer, teacher, its weighing and judge as *.safetensors, state.json: what continues
      manifest.json   sha256 and size of every file above

Written beside its place, fsynced, then renamed. No pickle: optimizer state is tensors by parameter name, and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from learner.inner_teacher import InnerModels
from learner.judge import Judge
from learner.moments import load_moments, moments
from learner.trainer import Trainer
from learner.weighing import Weighing
from potstill.errors import ConfigError
from potstill.journal import checkpoints, fsync_folder, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


def save(trainer: Trainer, folder: Path, *, card: str, tokenizer: Path, extra: Mapping[str, Any]) -> Path:
    """Write `folder`. `card` becomes model/README.md; `extra` (prompt cursor, counters) comes back from `restore`.

    Raises ConfigError when the folder exists: a checkpoint is never overwritten.
    """
    if folder.exists():
        raise ConfigError(f"checkpoint {folder.name} exists already")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    _write_model(trainer, temporary / "model", card, tokenizer)
    _write_trainer(trainer, temporary / "trainer", extra)
    write_json(temporary / "manifest.json", {"step": trainer.version, "files": digest(temporary)})
    for path in temporary.rglob("*"):
        fsync_folder(path) if path.is_dir() else _fsync(path)
    fsync_folder(temporary)
    temporary.rename(folder)
    fsync_folder(folder.parent)
    return folder


def restore(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Put weights, optimizer, teacher, weighing, judge, schedules and version back as they were. Returns `extra`.

    Raises ConfigError naming the first file that is missing or damaged.
    """
    verify(folder)
    state: dict[str, Any] = json.loads((folder / "trainer" / "state.json").read_text())
    weights = load_file(folder / "trainer" / "student.safetensors")
    with torch.no_grad():
        for name, parameter in _trainable(trainer).items():
            parameter.copy_(weights[name])
    load_moments(trainer.optimizer, _trainable(trainer), load_file(folder / "trainer" / "optimizer.safetensors"))
    for name, part in _beside(trainer).items():
        path = folder / "trainer" / f"{name}.safetensors"
        part.load(load_file(path) if path.exists() else {})
    trainer.schedules.load(state["schedules"])
    trainer.version = state["version"]
    return dict(state["extra"])


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises ConfigError on the first that differs."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError):
        raise ConfigError(f"{folder} is not a checkpoint: it has no readable manifest.json") from None
    found = digest(folder)
    for name, expected in files.items():
        if found.get(name) != expected:
            raise ConfigError(f"checkpoint {folder}: {name} is {'damaged' if name in found else 'missing'}")


def digest(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file but the manifest, by its path in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(folder)): {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in files}


def prune(parent: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(parent)[:-keep]:
        shutil.rmtree(old)


def _write_model(trainer: Trainer, folder: Path, card: str, tokenizer: Path) -> None:
    student = trainer.student
    folder.mkdir(parents=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in student.full_weights().items()}
    student.transformer.config.save_pretrained(folder)
    if student.transformer.generation_config is not None:
        student.transformer.generation_config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    (folder / "README.md").write_text(card)
    if student.network is not student.transformer:
        student.network.save_pretrained(folder.parent / "adapter")  # type: ignore[operator]


def _write_trainer(trainer: Trainer, folder: Path, extra: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    trainable = _trainable(trainer)
    save_file({n: p.detach().cpu().contiguous() for n, p in trainable.items()}, folder / "student.safetensors")
    save_file(moments(trainer.optimizer, trainable), folder / "optimizer.safetensors")
    for name, part in _beside(trainer).items():
        if kept := part.state():
            save_file(kept, folder / f"{name}.safetensors")
    state = {"version": trainer.version, "schedules": trainer.schedules.state()}
    write_json(folder / "state.json", {**state, "extra": dict(extra)})


def _beside(trainer: Trainer) -> dict[str, InnerModels | Judge | Weighing]:
    """What changes with the steps beside the student, by the name of its file; there is none where nothing does."""
    return {"teacher": trainer.inner, "judge": trainer.judge, "weighing": trainer.weighing}


def _trainable(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.student.network.named_parameters() if p.requires_grad}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
