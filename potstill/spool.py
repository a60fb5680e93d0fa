"""The run's spool: chunks of scored rollouts that are paid for and not yet trained on, a file each.

    <run>/rollouts/000000128-000000159.safetensors      the prompts 128 to 159 of the run's stream
        metadata "potstill"   receipts by prompt, and the payload's checksum     all that a loop reads
        metadata "checksum"   of the above
        "facts"               what is not an array of every rollout and its scores, as JSON
        "rollout.support_ids:int32:2"           the values of all rollouts, end to end
        "rollout.support_ids:int32:2:rows"      [R] whose they are          a field of a rollout that has
        "rollout.support_ids:int32:2:shapes"    [R, 2] and their shapes     no values is None

A file is whole or it is not there: one that is cut or damaged anywhere is reported, with the reason, and never read in
part. It holds every field of Rollout and TeacherScores bit for bit, whatever fields they are given later.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json
from safetensors import SafetensorError, safe_open

from potstill.durable import placed, take_away
from potstill.errors import ChunkLost
from potstill.fencing import Fence
from potstill.framing import METADATA_KEY, Arrays
from potstill.types import Bundle, Receipt, Rollout, ScoredRollout, TeacherScores

Groups = Mapping[int, Sequence[Receipt]]
"""Receipts by prompt index; their positions are in the chunk's list of rollouts."""

_PARTS: Mapping[str, type[Any]] = {"rollout": Rollout, "scores": TeacherScores}
_NAME = re.compile(r"(\d+)-(\d+)\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a spool holds: the receipts of every sound chunk, and why each other file counts as missing."""

    chunks: Mapping[range, Groups]  # by prompt indices, in their order
    lost: Mapping[Path, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    payload: str  # checksum
    groups: dict[int, list[dict[str, Any]]]


_HEAD = TypeAdapter(_Head)
_RECEIPT = TypeAdapter(Receipt)


def path_of(folder: Path, chunk: range) -> Path:
    """Where the spool in `folder` keeps a chunk.

    >>> path_of(Path("rollouts"), range(128, 160)).name
    '000000128-000000159.safetensors'
    """
    return folder / f"{chunk.start:09d}-{chunk.stop - 1:09d}.safetensors"


def write(folder: Path, scored: Sequence[ScoredRollout], groups: Groups, fence: Fence) -> Path:
    """Make a chunk durable and return its file. `groups`: its prompts, all of them, and each one's receipts.

    A sound file of these prompts stays as it is: `receipts` of the path returned are those that count.
    Raises Fenced when a newer attempt has begun, RunError when the disk is full or refuses.
    """
    chunk = range(min(groups), max(groups) + 1)
    if sorted(groups) != list(chunk):
        raise ValueError(f"a chunk is a range of prompts, not {sorted(groups)}")
    path = path_of(folder, chunk)
    if path.exists() and _flaw(path, thorough=True) is None:
        return path
    arrays = _columns(scored)
    slips = {prompt: [_slip(receipt) for receipt in receipts] for prompt, receipts in groups.items()}
    head = _json(_Head(payload=_payload(arrays), groups=slips)).decode()
    metadata = {METADATA_KEY: head, "checksum": _checksum(head.encode())}
    with placed(path, fence) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays, metadata))
    return path


def read(path: Path) -> list[ScoredRollout]:
    """Every rollout of a chunk; arrays are views of what was read. Raises ChunkLost when a bit of it is wrong."""
    head, arrays = _head(path), _arrays(path)
    if _payload(arrays) != head.payload:
        raise ChunkLost(f"{path}: its arrays are damaged")
    return _rollouts(arrays)


def receipts(path: Path) -> dict[int, list[Receipt]]:
    """The receipts of a chunk by prompt index, from the file's header alone. Raises ChunkLost."""
    bundle = Bundle(ref=None, path=str(path))
    try:
        return {
            prompt: [_RECEIPT.validate_python({**slip, "bundle": bundle}) for slip in slips]
            for prompt, slips in _head(path).groups.items()
        }
    except ValidationError as error:
        raise ChunkLost(f"{path}: its receipts are of another version of potstill") from error


def listing(folder: Path, *, thorough: bool = False) -> Listing:
    """What the spool holds, from headers alone; `thorough`: the arrays are read and checked too.

    Without it a damaged array is found when its chunk is read.
    """
    chunks: dict[range, Groups] = {}
    lost: dict[Path, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        flaw = _flaw(path, thorough=thorough)
        if flaw is None:
            chunks[_named(path)] = receipts(path)
        else:
            lost[path] = flaw
    return Listing(chunks=dict(sorted(chunks.items(), key=lambda item: item[0].start)), lost=lost)


def prune(folder: Path, *, trained: Callable[[int], bool]) -> list[Path]:
    """Remove the chunks whose prompts are all `trained`, as a durable checkpoint says; returns which."""
    done = [
        path for path in sorted(folder.glob("*.safetensors")) if (named := _named(path)) and all(map(trained, named))
    ]
    for path in done:
        take_away(path)
    return done


def _named(path: Path) -> range:
    """The prompts that a file is named after; none where the name is not a chunk's."""
    found = _NAME.fullmatch(path.name)
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


def _flaw(path: Path, *, thorough: bool) -> str | None:
    """Why the file counts as missing; None: it does not."""
    try:
        held = receipts(path)
        if thorough:
            read(path)
    except ChunkLost as error:
        return str(error)
    return None if list(held) == list(_named(path)) else f"{path}: its name does not say which prompts it holds"


def _head(path: Path) -> _Head:
    """The header, checked. The library compares the file's size with it."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ChunkLost(f"{path}: missing, cut short or damaged ({error})") from error
    text = metadata.get(METADATA_KEY, "").encode()
    if _checksum(text) != metadata.get("checksum"):
        raise ChunkLost(f"{path}: its receipts are damaged")
    try:
        return _HEAD.validate_json(text)
    except ValidationError as error:
        raise ChunkLost(f"{path}: its header is of another version of potstill") from error


def _arrays(path: Path) -> Arrays:
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ChunkLost(f"{path}: missing, cut short or damaged ({error})") from error


def _payload(arrays: Arrays) -> str:
    """Checksum of every array, its name and its form, so that no damage to the file's table goes unseen either."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _checksum(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _json(value: Any) -> bytes:
    """NaN stays NaN, which JSON has no number for: potstill alone reads this."""
    return to_json(value, inf_nan_mode="constants")


def _slip(receipt: Receipt) -> dict[str, Any]:
    return {field.name: getattr(receipt, field.name) for field in fields(receipt) if field.name != "bundle"}


# ------------------------------------------------------------------------------------- rollouts to columns and back


def _columns(scored: Sequence[ScoredRollout]) -> Arrays:
    """The arrays of a file. A column is of one field, dtype and number of dimensions: nothing is ever converted."""
    facts: list[dict[str, Any]] = []
    columns: dict[str, dict[int, NDArray[Any]]] = defaultdict(dict)
    for row, one in enumerate(scored):
        values = _values(one)
        facts.append({name: value for name, value in values.items() if not isinstance(value, np.ndarray)})
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                columns[f"{name}:{value.dtype.name}:{value.ndim}"][row] = value
    arrays: Arrays = {"facts": np.frombuffer(_json(facts), np.uint8)}
    for name, rows in columns.items():
        arrays[name] = np.concatenate([value.ravel() for value in rows.values()])
        arrays[f"{name}:rows"] = np.array(list(rows), np.int64)
        arrays[f"{name}:shapes"] = np.array([value.shape for value in rows.values()], np.int64)
    return arrays


def _values(one: ScoredRollout) -> dict[str, Any]:
    """Every field that is not None, as "rollout.reward" and "scores.status"."""
    parts = {part: getattr(one, part) for part in _PARTS}
    return {
        f"{part}.{field.name}": value
        for part, record in parts.items()
        if record is not None
        for field in fields(record)
        if (value := getattr(record, field.name)) is not None
    }


def _rollouts(arrays: Arrays) -> list[ScoredRollout]:
    found: list[dict[str, Any]] = [
        {name: _adapter(name).validate_python(value) for name, value in facts.items()}
        for facts in from_json(arrays["facts"].tobytes())
    ]
    for column in (name.removesuffix(":rows") for name in arrays if name.endswith(":rows")):
        shapes = arrays[f"{column}:shapes"]
        ends = np.cumsum([0, *shapes.prod(axis=1)]).tolist()
        for row, shape, (start, end) in zip(arrays[f"{column}:rows"], shapes, pairwise(ends), strict=True):
            found[row][column.partition(":")[0]] = arrays[column][start:end].reshape(shape)
    return [ScoredRollout(rollout=_part("rollout", values), scores=_part("scores", values)) for values in found]


def _part(part: str, values: Mapping[str, Any]) -> Any:
    """A Rollout or TeacherScores from the values that it had; None where it had none."""
    names = {field.name: f"{part}.{field.name}" for field in fields(_PARTS[part])}
    if not any(name in values for name in names.values()):
        return None
    return _PARTS[part](**{field: values.get(name) for field, name in names.items()})


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    """Of a field that is no array: JSON has neither enums nor tuples."""
    part, _, field = name.partition(".")
    return TypeAdapter(get_type_hints(_PARTS[part])[field])
