"""The mechanics under potstill/codec.py: arrays and one JSON object in a safetensors file, ragged rows, JSON lists.

Bytes from a network are checked before they are believed: header size, names, dtypes, dimensions, offsets.
It refuses with WireError, which names the field, and knows nothing of what the fields mean.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError

from potstill.errors import AlignmentError
from potstill.types import IntArray

METADATA_KEY = "potstill"
MAX_HEADER_BYTES = 4 * 2**20

Arrays = dict[str, NDArray[Any]]
Parsed = TypeVar("Parsed")


class WireError(AlignmentError):
    """A message is malformed. args: what is wrong, and the field, e.g. "items[3].completion_ids"."""

    @property
    def param(self) -> str:
        return str(self.args[1])

    def __str__(self) -> str:
        return f"{self.args[1]}: {self.args[0]}"


class Part(BaseModel):
    """A JSON object of a message: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Column:
    """What an array of a message must look like. `dtype` in safetensors' names, e.g. "F32"."""

    dtype: str
    dimensions: int
    required: bool = False


def require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise WireError(message, param)


def pack(arrays: Arrays, head: Mapping[str, Any]) -> bytes:
    """One safetensors file with `head` in its metadata."""
    metadata = {METADATA_KEY: json.dumps(head, allow_nan=False)}
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)


def unpack(body: bytes, columns: Mapping[str, Column]) -> tuple[Arrays, str]:
    """The arrays of `body`, read-only, and its JSON head as text. Raises WireError unless they are as `columns` say."""
    header = _header(body)
    metadata = header.pop("__metadata__", None)
    require(isinstance(metadata, dict) and METADATA_KEY in metadata, "metadata", f"has no {METADATA_KEY!r} entry")
    for name, entry in header.items():
        require(name in columns, name, "is not a field of this message")
        is_right = isinstance(entry, dict) and entry.get("dtype") == columns[name].dtype
        require(is_right, name, f"must have dtype {columns[name].dtype}")
    for name, column in columns.items():
        require(name in header or not column.required, name, "is missing")
    try:
        arrays = safetensors.numpy.load(body)
    except SafetensorError:
        raise WireError("is not a sound safetensors file", "body") from None
    for name, array in arrays.items():
        require(array.ndim == columns[name].dimensions, name, f"must have {columns[name].dimensions} dimensions")
    return arrays, metadata[METADATA_KEY]


def _header(body: bytes) -> dict[str, Any]:
    require(len(body) >= 8, "body", "is too short for a safetensors file")
    (size,) = struct.unpack_from("<Q", body)
    require(size <= MAX_HEADER_BYTES, "body", f"its header is larger than {MAX_HEADER_BYTES} bytes")
    require(8 + size <= len(body), "body", "ends inside its header")
    try:
        header = json.loads(body[8 : 8 + size])
    except (ValueError, RecursionError):
        raise WireError("its header is not JSON", "body") from None
    require(isinstance(header, dict), "body", "its header is not an object")
    return dict(header)


def join(rows: Sequence[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Offsets [B+1] and the rows laid end to end."""
    return np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64), np.concatenate(rows)


def bounds(arrays: Arrays, name: str, count: int) -> list[int]:
    """The offsets [count+1] called `name`, checked to start at 0 and never to fall."""
    offsets: list[int] = arrays[name].tolist()
    require(len(offsets) == count + 1, name, f"has {len(offsets)} values for {count} items")
    require(offsets[0] == 0 and offsets == sorted(offsets), name, "must start at 0 and never fall")
    return offsets


def parse(adapter: TypeAdapter[Parsed], text: bytes | str, param: str) -> Parsed:
    """JSON to the adapter's type. Raises WireError naming the field; `param` where there is none, as for bad JSON."""
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"][:3])
    raise WireError(problem["msg"].lower(), where.removeprefix(".") or param)


def ids_from_list(values: Sequence[int] | Sequence[Sequence[int]], param: str) -> IntArray:
    """An int32 array; raises WireError when rows differ in length."""
    try:
        return np.asarray(values, np.int32)
    except (ValueError, OverflowError):
        raise WireError("must have rows of equal length, of 32-bit integers", param) from None


def floats_from_list(values: Sequence[Any], param: str) -> NDArray[np.float32]:
    """A float32 array of numbers, nulls (NaN) and rows of them; raises WireError when rows differ in length."""
    try:
        return np.asarray(values, np.float32)  # numpy reads None as NaN
    except (ValueError, TypeError):
        raise WireError("must have rows of equal length", param) from None


def halves_from_list(values: Sequence[Sequence[int]], param: str) -> NDArray[np.uint16]:
    """A uint16 array, the bits of bfloat16 numbers; raises WireError when rows differ in length."""
    try:
        return np.asarray(values, np.uint16)
    except (ValueError, OverflowError):
        raise WireError("must have rows of equal length, of 16-bit integers", param) from None


def plain(array: NDArray[Any]) -> list[Any]:
    """Nested lists fit for JSON: null for NaN, and "-Infinity", which JSON has no number for, as text."""
    return [_plain(value) for value in array.tolist()]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value != value:
        return None
    return "-Infinity" if value == -np.inf else value
