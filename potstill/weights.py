"""A version of the student's weights as one flat buffer, with a table that says where each tensor lies.

numpy only. It moves no bytes between processes and knows no model: the learner packs, a rollout worker unpacks,
and what travels between them is a WeightsVersion and one uint8 array. Nothing is unpacked that fails its checksum.

    payload   [ tensor | gap | tensor | gap | tensor ]    each tensor starts at a multiple of ALIGNMENT bytes
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from potstill.errors import StaleWeights, WeightsError
from potstill.types import TensorEntry, WeightsVersion

ALIGNMENT = 64  # bytes; a view of any dtype is aligned, and vector loads do not straddle cache lines

Array = NDArray[Any]

# numpy has no bfloat16: its bits travel as uint16, and no weight is ever a true uint16.
_NUMPY_OF: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
_SAFETENSORS_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAME_OF = {dtype: name for name, dtype in _NUMPY_OF.items()}


def pack(tensors: Mapping[str, Array], version: int) -> tuple[WeightsVersion, NDArray[np.uint8]]:
    """Copy `tensors` into one flat buffer. bfloat16 tensors are given as uint16 arrays of their bits.

    Returns the version with its table and checksum but without a payload, and the payload [num_bytes].
    Raises WeightsError for a tensor of another dtype, and when there is none.
    """
    if not tensors:
        raise WeightsError(f"weights version {version}: there is no tensor to pack")
    entries: list[TensorEntry] = []
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAME_OF:
            raise WeightsError(f"{name}: dtype {tensor.dtype} cannot travel; use {', '.join(_NUMPY_OF)}")
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + tensor.nbytes
        entries.append(
            TensorEntry(
                name=name, dtype=_NAME_OF[tensor.dtype], shape=tensor.shape, offset=offset, nbytes=tensor.nbytes
            )
        )
    payload = np.zeros(end, dtype=np.uint8)
    for entry, tensor in zip(entries, tensors.values(), strict=True):
        np.copyto(_view(payload, entry), tensor)
    digest = _digest(version, entries, payload)
    return WeightsVersion(version=version, sha256=digest, tensors=tuple(entries), payload=None), payload


def unpack(version: WeightsVersion, payload: NDArray[np.uint8]) -> dict[str, Array]:
    """Views into `payload`, by name; nothing is copied. bfloat16 tensors are uint16 views of their bits.

    Raises WeightsError naming what differs: an entry that contradicts itself, leaves the payload or overlaps another,
    the payload's size, or the checksum.
    """
    _check_table(version.tensors)
    if payload.dtype != np.uint8 or payload.ndim != 1 or not payload.flags.c_contiguous:
        raise WeightsError(f"weights version {version.version}: the payload must be one contiguous row of bytes")
    end = max(entry.offset + entry.nbytes for entry in version.tensors)
    if payload.size != end:
        raise WeightsError(f"weights version {version.version}: payload has {payload.size} bytes, its table says {end}")
    digest = _digest(version.version, version.tensors, payload)
    if digest != version.sha256:
        raise WeightsError(
            f"weights version {version.version}: sha256 is {digest[:12]}…, should be {version.sha256[:12]}…: "
            "fetch the payload again"
        )
    return {entry.name: _view(payload, entry) for entry in version.tensors}


def as_safetensors(version: WeightsVersion, payload: NDArray[np.uint8]) -> bytes:
    """The version as a safetensors file, its number in the metadata; for those who know no payload of ours.

    Written out here because the library takes numpy's dtypes, and numpy has no bfloat16. Raises WeightsError.
    """
    tensors = unpack(version, payload)
    header: dict[str, Any] = {"__metadata__": {"version": str(version.version)}}
    end = 0
    for entry in version.tensors:
        header[entry.name] = {
            "dtype": _SAFETENSORS_NAME[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensor.tobytes() for tensor in tensors.values())])


def check_newer(current: int, offered: int) -> None:
    """Raise StaleWeights unless `offered` is a later version than `current`."""
    if offered <= current:
        raise StaleWeights(f"weights version {offered} was offered, version {current} is already loaded: keep it")


def check_fits(version: WeightsVersion, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Raise WeightsError unless the version holds exactly the tensors of `shapes`, all of `dtype`."""
    offered = {entry.name: entry for entry in version.tensors}
    for problem, names in (("missing", shapes.keys() - offered.keys()), ("unknown", offered.keys() - shapes.keys())):
        if names:
            raise WeightsError(f"weights version {version.version}: {problem} tensors: {', '.join(sorted(names))}")
    for name, shape in shapes.items():
        entry = offered[name]
        if tuple(entry.shape) != tuple(shape) or entry.dtype != dtype:
            raise WeightsError(
                f"weights version {version.version}: {name} is {entry.dtype} {list(entry.shape)}, "
                f"the student's is {dtype} {list(shape)}"
            )


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a model folder, from the headers of its safetensors files alone.

    A head that is tied to the embedding is left out: it is the same tensor under a second name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    if not shapes:
        raise WeightsError(f"{folder}: holds no model weights (*.safetensors)")
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def _check_table(entries: Sequence[TensorEntry]) -> None:
    if not entries:
        raise WeightsError("the table of tensors is empty")
    if len({entry.name for entry in entries}) != len(entries):
        raise WeightsError("the table of tensors names one tensor twice")
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.dtype not in _NUMPY_OF:
            raise WeightsError(f"{entry.name}: dtype {entry.dtype!r} is not one of {', '.join(_NUMPY_OF)}")
        if entry.nbytes != math.prod(entry.shape) * _NUMPY_OF[entry.dtype].itemsize or min(entry.shape, default=0) < 0:
            raise WeightsError(f"{entry.name}: {entry.nbytes} bytes do not hold {entry.dtype} {list(entry.shape)}")
        if entry.offset < 0 or entry.offset % ALIGNMENT:
            raise WeightsError(f"{entry.name}: offset {entry.offset} is not a multiple of {ALIGNMENT}")
        if entry.offset < end:
            raise WeightsError(f"{entry.name}: overlaps {before}")
        end, before = entry.offset + entry.nbytes, entry.name


def _view(payload: NDArray[np.uint8], entry: TensorEntry) -> Array:
    raw = payload[entry.offset : entry.offset + entry.nbytes]
    return raw.view(_NUMPY_OF[entry.dtype]).reshape(entry.shape)


def _digest(version: int, entries: Sequence[TensorEntry], payload: NDArray[np.uint8]) -> str:
    """sha256 of the version, the table and the payload: a swapped name is damage as much as a flipped bit."""
    table = [[entry.name, entry.dtype, list(entry.shape), entry.offset, entry.nbytes] for entry in entries]
    digest = hashlib.sha256(json.dumps([version, table], separators=(",", ":")).encode())
    digest.update(payload.data)
    return digest.hexdigest()
