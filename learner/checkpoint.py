"""A checkpoint is complete and verified, or invisible.

    step-000123/
      model/          what transformers and vLLM load: config, safetensors, tokenizer, chat template, README.md
      adapter/        only with LoRA: the adapter alone, for peft
      trainer/        what continues beside model/: optimizer, the float32 weights behind a bfloat16 student, teacher,
                      its weighing, judge, random generators and, with LoRA, the adapter by the learner's own names as
                      *.safetensors; state.json
      manifest.json   sha256 and size of every file above

    trainer ── capture ──► Captured ── write ──► step-000123        training goes on after capture: write, on a thread
       ▲     copies only                           │                of its own, never looks at the trainer
       └───────────────── restore ◄── newest_good ─┘

Written beside its place, fsynced, then renamed. No pickle: optimizer state is tensors by parameter name, and JSON.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.inner_teacher import InnerModels
from learner.judge import Judge
from learner.masters import Masters
from learner.moments import load_moments, moments
from learner.trainer import Trainer
from learner.weighing import Weighing
from potstill.durable import placed, take_away
from potstill.errors import RunError
from potstill.fencing import Fence, newest_attempt
from potstill.journal import KEPT, checkpoints, write_json
from potstill.manifest import MANIFEST, digest, flaw_in, verify

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_ASIDE = ".damaged"


class Saveable(Protocol):
    """A configuration of transformers or peft."""

    def save_pretrained(self, save_directory: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Everything of a trainer that decides the next number, in memory that no later step touches."""

    version: int
    schedules: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]  # by file, without its suffix
    configs: tuple[tuple[str, Saveable], ...]  # and the folders they belong to


@torch.no_grad()
def capture(trainer: Trainer) -> Captured:
    """Copy to the CPU what `write` needs; takes as long as copying that memory, and no file is opened.

    Over several ranks all of them call, between two steps, and rank 0's is the one to write.
    """
    student, trainable = trainer.student, _trainable(trainer)
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model/model": student.ranks.whole(student.full_weights()),
        "trainer/optimizer": moments(trainer.optimizer, trainer.masters.weights, student.ranks),
        "trainer/generators": _generators(student.head.device),
        **{f"trainer/{name}": part.state() for name, part in _beside(trainer).items()},
    }
    configs: list[tuple[str, Saveable]] = [("model", student.transformer.config)]
    if student.transformer.generation_config is not None:
        configs.append(("model", student.transformer.generation_config))
    if _is_adapted(trainer):
        tensors["trainer/student"] = student.ranks.whole(trainable)
        tensors["adapter/adapter_model"], config = _adapter(trainer, tensors["trainer/student"])
        configs.append(("adapter", config))
    return Captured(
        version=trainer.version,
        schedules=copy.deepcopy(trainer.schedules.state()),
        tensors=_copied(tensors),
        configs=tuple((name, copy.deepcopy(config)) for name, config in configs),
    )


def tokenizer_files(model: Path) -> dict[str, bytes]:
    """Those that a model folder has, by name: read before the first step, for the folder may be gone by the last."""
    return {name: (model / name).read_bytes() for name in TOKENIZER_FILES if (model / name).is_file()}


def write(
    captured: Captured,
    folder: Path,
    *,
    card: str,
    tokenizer: Mapping[str, bytes],
    extra: Mapping[str, Any],
    fence: Fence,
) -> Path:
    """Write `folder`, and read it back. `card` becomes model/README.md, `tokenizer` the files beside it; `extra`
    (prompt cursor, counters) comes back from `restore`. Call it from any thread.

    A sound checkpoint that is there already stays as it is; one that is damaged is set aside. Raises Fenced when a
    newer attempt of the run has begun, RunError when the disk is full or gives back other bytes than it was given.
    """
    if folder.exists():
        if flaw_in(folder) is None:
            return folder
        _set_aside(folder)
    with placed(folder, fence) as temporary:
        for name, config in captured.configs:
            config.save_pretrained(str(temporary / name))
        for name, tensors in captured.tensors.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            if tensors:
                save_file(dict(tensors), temporary / f"{name}.safetensors", metadata={"format": "pt"})
        for name, content in tokenizer.items():
            (temporary / "model" / name).write_bytes(content)
        (temporary / "model" / "README.md").write_text(card)
        state = {"version": captured.version, "schedules": captured.schedules, "extra": dict(extra)}
        write_json(temporary / "trainer" / "state.json", state)
        write_json(temporary / MANIFEST, {"step": captured.version, "files": digest(temporary)})
    flaw = flaw_in(folder)
    if flaw is not None:
        raise RunError(f"{flaw}, though it has just been written: the disk cannot be trusted; use another and resume")
    return folder


def save(trainer: Trainer, folder: Path, *, card: str, tokenizer: Path, extra: Mapping[str, Any]) -> Path:
    """Capture and write at once, as the run's newest attempt: for those who have time to wait."""
    run = folder.parent.parent
    fence = Fence(run, newest_attempt(run))
    return write(capture(trainer), folder, card=card, tokenizer=tokenizer_files(tokenizer), extra=extra, fence=fence)


@torch.no_grad()
def restore(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Put everything that decides the next number back as it was. Returns `extra`.

    Raises ConfigError naming the first file that is missing or damaged.
    """
    verify(folder)
    state: dict[str, Any] = json.loads((folder / "trainer" / "state.json").read_text())
    ranks, trainable = trainer.student.ranks, _trainable(trainer)
    weights = load_file(folder / ("trainer/student.safetensors" if _is_adapted(trainer) else "model/model.safetensors"))
    for name, parameter in trainable.items():
        parameter.copy_(ranks.lay(weights[name], like=parameter))
    load_moments(trainer.optimizer, trainer.masters.weights, _load(folder / "trainer" / "optimizer"), ranks)
    for name, part in _beside(trainer).items():
        part.load(_load(folder / "trainer" / name))
    _set_generators(_load(folder / "trainer" / "generators"), trainer.student.head.device)
    trainer.schedules.load(state["schedules"])
    trainer.version = state["version"]
    return dict(state["extra"])


def prune(parent: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and those another run begins with, and damaged ones set aside."""
    for old in [*checkpoints(parent)[:-keep], *parent.glob(f"step-*{_ASIDE}")]:
        take_away(old, unless=KEPT)


def _set_aside(folder: Path) -> None:
    """Under a name that is no checkpoint's: somebody may still want what is left of it."""
    aside = folder.with_name(f"{folder.name}{_ASIDE}")
    if aside.exists():
        take_away(aside)
    folder.rename(aside)


def _beside(trainer: Trainer) -> dict[str, Masters | InnerModels | Judge | Weighing]:
    """What changes with the steps beside the student, by the name of its file; there is none where nothing does."""
    return {
        "masters": trainer.masters,
        "teacher": trainer.inner,
        "judge": trainer.judge,
        "weighing": trainer.weighing,
    }


def _trainable(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.student.network.named_parameters() if p.requires_grad}


def _is_adapted(trainer: Trainer) -> bool:
    return trainer.student.network is not trainer.student.transformer


def _adapter(trainer: Trainer, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Saveable]:
    """The adapter under peft's names for files, and its configuration as peft saves it."""
    import peft

    network: Any = trainer.student.network
    config = copy.deepcopy(network.peft_config["default"])
    config.inference_mode = True
    return peft.get_peft_model_state_dict(network, state_dict=dict(weights)) if weights else {}, config


def _copied(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """On the CPU, and nobody else's: from a GPU all at once, into pinned memory. One in two files is copied once."""
    done: dict[int, Tensor] = {}
    for tensor in (tensor for tensors in files.values() for tensor in tensors.values()):
        if id(tensor) not in done:
            done[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            done[id(tensor)].copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {file: {name: done[id(tensor)] for name, tensor in tensors.items()} for file, tensors in files.items()}


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's random generators, which are all that the learner draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:  # else it was written on another kind of device
        torch.cuda.set_rng_state(states["cuda"], device)


def _load(name: Path) -> dict[str, Tensor]:
    """The tensors of a file, named without its suffix; there is none where there was nothing to keep."""
    path = name.with_suffix(".safetensors")
    return load_file(path) if path.exists() else {}
