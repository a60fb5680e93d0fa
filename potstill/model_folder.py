"""What must not be in a model folder, found out before anything loads it.

    check_model_folder    whoever loads a folder: it asks for no code, no kernels, and no weights from elsewhere
    why_unsafe            whoever lets others name a folder: it holds no code and no pickles at all, links to nothing
                          outside, and its safetensors files are sound

Reads JSON and headers, never a weight. A folder that only somebody who trusts it loads may hold more than it needs:
nothing here loads a pickle or runs a folder's code, whatever lies there.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill import shards
from potstill.errors import ConfigError

CODE = frozenset({".py", ".pyc", ".pyx", ".so", ".dll", ".dylib"})
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".hdf5", ".msgpack", ".joblib", ".npz"})
MOST_ENTRIES = 10_000
MOST_CONFIG_BYTES = 16 * 2**20
_DEEPEST = 8


def check_model_folder(folder: Path) -> None:
    """Raise ConfigError when the folder is missing, its configs cannot be read, or they ask for what is not in it."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such model folder")
    try:
        for problem in _in_configs(folder):
            raise ConfigError(f"{folder}: {problem}")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error.strerror}") from None


def why_unsafe(folder: Path, *, within: Path, weights: bool = True) -> str | None:
    """Why nobody should load what lies in a folder that a stranger may name; None when nothing speaks against it.

    Links may lead anywhere inside `within`, a resolved path. `weights`: there must be some. No path is told.
    """
    try:
        for problem in _in_files(folder, within, weights):
            return problem
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _in_files(folder: Path, within: Path, weights: bool) -> Iterator[str]:
    found = []
    for path in _walk(folder, _DEEPEST):
        name = path.relative_to(folder).as_posix()
        found.append(path)
        if len(found) > MOST_ENTRIES:
            yield f"holds more than {MOST_ENTRIES} files"
        if not Path(os.path.realpath(path, strict=True)).is_relative_to(within):
            yield f"{name} is a link that leads out of it"
        if not stat.S_ISREG(path.stat().st_mode):
            yield f"{name} is not a file, or lies too deep"
        if path.suffix.lower() in CODE:
            yield f"{name} is code, which is never run: take it out"
        if path.suffix.lower() in PICKLES:
            yield f"{name} may run code when it is loaded: keep weights as *.safetensors, and nothing else beside them"
    yield from _in_configs(folder)
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names, from anywhere
        yield "adapter_config.json names a base elsewhere: merge the adapter into its base"
    tensors = [path for path in found if path.suffix.lower() == ".safetensors"]
    if weights and not any(path.parent == folder for path in tensors):
        yield "it has no *.safetensors"
    for path in tensors:
        problem = shards.problem_in(path)
        if problem is not None:
            yield f"{path.relative_to(folder).as_posix()} {problem}"


def _walk(folder: Path, levels: int) -> Iterator[Path]:
    """Every entry below that is no folder; of folders, those that are links or lie too deep."""
    for entry in sorted(os.scandir(folder), key=lambda one: one.name):
        if entry.is_dir() and not entry.is_symlink() and levels > 0:
            yield from _walk(Path(entry.path), levels - 1)
        else:
            yield Path(entry.path)


def _in_configs(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*config*.json")):
        settings = _json(file)
        if settings is None:
            yield f"{file.name}: is not readable JSON"
        for key, value in _pairs(settings):
            if key == "auto_map":
                yield f"{file.name}: asks to run its own code (auto_map), which is never done"
            if key.endswith("_implementation") and "/" in json.dumps(value):
                yield f"{file.name}: asks for kernels from elsewhere ({key}), which are never run"
    for file in sorted(folder.glob("*.safetensors.index.json")):
        index = _json(file)
        shards_by_tensor = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards_by_tensor, dict):
            yield f"{file.name}: is no index of weights"
            continue
        for name in sorted(set(map(str, shards_by_tensor.values()))):
            if Path(name).name != name or "\\" in name or not (folder / name).is_file():
                yield f"{file.name}: names a file that is not beside it"


def _json(file: Path) -> Any:
    """None for what is no JSON, or longer than a config is."""
    if not file.is_file() or file.stat().st_size > MOST_CONFIG_BYTES:
        return None
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


def _pairs(settings: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [settings]
    while waiting:
        inside = waiting.pop()
        if isinstance(inside, dict):
            yield from inside.items()
            waiting.extend(inside.values())
        elif isinstance(inside, list):
            waiting.extend(inside)
