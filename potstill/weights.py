"""A version of the student's weights as one flat buffer, with a table that says where each tensor lies.

numpy and xxhash only. It moves no bytes between processes and knows no model: the learner packs, a rollout worker
unpacks, and what travels between them is a WeightsVersion and one uint8 array. Nothing is unpacked that fails its
checksums. They find damage and mistakes, not malice: xxh3 keeps up with memory, a cryptographic hash does not.

    payload   [ tensor | gap | tensor | gap | tensor ]    each tensor starts at a multiple of ALIGNMENT bytes
    buckets   [     0      |     1      |    2    ]       BUCKET_BYTES each, the last one shorter; a checksum of each
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import safe_open

from potstill.errors import StaleWeights, WeightsError
from potstill.types import TensorEntry, WeightsVersion

ALIGNMENT = 64  # bytes; a view of any dtype is aligned, and vector loads do not straddle cache lines
BUCKET_BYTES = 8 << 20  # what one checksum covers
CACHED_BYTES = 2 << 20  # hashed and then copied at a time; measured: 1 to 8 MiB are alike, less is slower
THREADS = min(4, os.cpu_count() or 1)  # that hash and copy, for as long as it takes

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

# numpy has no bfloat16: its bits travel as uint16, and no weight is ever a true uint16.
_NUMPY_OF: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
_SAFETENSORS_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAME_OF = {dtype: name for name, dtype in _NUMPY_OF.items()}


def fresh(nbytes: int) -> Bytes:
    """A new buffer for a payload."""
    return np.empty(nbytes, dtype=np.uint8)


def pack(
    tensors: Mapping[str, Array],
    version: int,
    *,
    room: Callable[[int], Bytes] = fresh,
    adapter_scale: float | None = None,
    rounded: bool = False,
) -> tuple[WeightsVersion, Bytes]:
    """Copy `tensors` into the buffer that `room` gives for so many bytes. bfloat16 tensors are uint16 arrays of bits.

    Returns the version with its table and checksums but without a payload, and the payload [num_bytes].
    Raises WeightsError for a tensor of another dtype, and when there is none.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAME_OF:
            raise WeightsError(f"{name}: dtype {tensor.dtype} cannot travel; use {', '.join(_NUMPY_OF)}")
    entries = laid_out((name, _NAME_OF[tensor.dtype], tensor.shape) for name, tensor in tensors.items())
    payload = room(entries[-1].offset + entries[-1].nbytes)
    described = WeightsVersion(
        version=version,
        digest="",
        checksums=tuple(_fill(payload, zip(entries, tensors.values(), strict=True))),
        tensors=entries,
        payload=None,
        adapter_scale=adapter_scale,
        rounded=rounded,
    )
    return sealed(described), payload


def laid_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorEntry, ...]:
    """The table of a payload that holds these tensors (name, dtype, shape) in this order. Raises WeightsError for a
    tensor of another dtype, and when there is none."""
    entries: list[TensorEntry] = []
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in _NUMPY_OF:
            raise WeightsError(f"{name}: dtype {dtype} cannot travel; use {', '.join(_NUMPY_OF)}")
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        nbytes = math.prod(shape) * _NUMPY_OF[dtype].itemsize
        end = offset + nbytes
        entries.append(TensorEntry(name=name, dtype=dtype, shape=tuple(shape), offset=offset, nbytes=nbytes))
    if not entries:
        raise WeightsError("there is no tensor to pack")
    return tuple(entries)


def sealed(version: WeightsVersion) -> WeightsVersion:
    """With the digest of what it says."""
    return replace(version, digest=_digest(version))


def check_seal(version: WeightsVersion) -> None:
    """Raise WeightsError when the table contradicts itself, or is not the one that its checksum is of."""
    _check_table(version.tensors)
    if _digest(version) != version.digest:
        raise WeightsError(f"weights version {version.version}: its table is not the one that its checksum is of")


def unpack(version: WeightsVersion, payload: Bytes) -> dict[str, Array]:
    """Views into `payload`, by name; nothing is copied. bfloat16 tensors are uint16 views of their bits.

    Raises WeightsError naming what differs: an entry that contradicts itself, leaves the payload or overlaps another,
    the payload's size, or a checksum.
    """
    _check_table(version.tensors)
    if payload.dtype != np.uint8 or payload.ndim != 1 or not payload.flags.c_contiguous:
        raise WeightsError(f"weights version {version.version}: the payload must be one contiguous row of bytes")
    end = max(entry.offset + entry.nbytes for entry in version.tensors)
    if payload.size != end:
        raise WeightsError(f"weights version {version.version}: payload has {payload.size} bytes, its table says {end}")
    check_seal(version)
    with ThreadPoolExecutor(THREADS) as pool:
        found = tuple(pool.map(lambda part: xxhash.xxh3_64_intdigest(payload[part].data), buckets(payload.size)))
    if found != version.checksums:
        damaged = [
            number for number, pair in enumerate(zip(found, version.checksums, strict=False)) if len(set(pair)) > 1
        ]
        raise WeightsError(
            f"weights version {version.version}: the checksum of {len(damaged)} of {len(found)} buckets differs, "
            f"first of bucket {damaged[0] if damaged else len(found)}: fetch the payload again"
        )
    return {entry.name: _view(payload, entry) for entry in version.tensors}


def buckets(nbytes: int) -> Iterator[slice]:
    """The ranges of a payload that have a checksum each."""
    for start in range(0, nbytes, BUCKET_BYTES):
        yield slice(start, min(start + BUCKET_BYTES, nbytes))


def as_safetensors(version: WeightsVersion, payload: Bytes) -> bytes:
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
    """Raise WeightsError unless the version holds exactly the tensors of `shapes`, in `dtype` or rounded from it."""
    sent = "bfloat16" if version.rounded else dtype
    offered = {entry.name: entry for entry in version.tensors}
    for problem, names in (("missing", shapes.keys() - offered.keys()), ("unknown", offered.keys() - shapes.keys())):
        if names:
            raise WeightsError(f"weights version {version.version}: {problem} tensors: {', '.join(sorted(names))}")
    for name, shape in shapes.items():
        entry = offered[name]
        if tuple(entry.shape) != tuple(shape) or entry.dtype != sent:
            raise WeightsError(
                f"weights version {version.version}: {name} is {entry.dtype} {list(entry.shape)}, "
                f"the student's is {sent} {list(shape)}"
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


def _view(payload: Bytes, entry: TensorEntry) -> Array:
    raw = payload[entry.offset : entry.offset + entry.nbytes]
    return raw.view(_NUMPY_OF[entry.dtype]).reshape(entry.shape)


def _fill(payload: Bytes, sources: Iterable[tuple[TensorEntry, Array]]) -> Iterator[int]:
    """Write every tensor to its place and zeros between them. Yields the checksum of each bucket.

    One bucket a thread: one core alone does not fill a machine's memory bandwidth, and hashes and copies free the GIL.
    """
    contents: list[list[Bytes]] = [[] for _ in buckets(payload.size)]
    end = 0
    for piece in _pieces(sources):
        contents[end // BUCKET_BYTES].append(piece)
        end += piece.size
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(_write, (payload[part] for part in buckets(payload.size)), contents)


def _pieces(sources: Iterable[tuple[TensorEntry, Array]]) -> Iterator[Bytes]:
    """The payload from its first byte to its last, cut where a bucket ends.

    No bucket ends within a gap: ALIGNMENT divides BUCKET_BYTES.
    """
    end = 0
    for entry, tensor in sources:
        if entry.offset > end:
            yield np.zeros(entry.offset - end, np.uint8)
        end = entry.offset + entry.nbytes
        raw = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        start = 0
        while start < raw.size:
            stop = start + BUCKET_BYTES - (entry.offset + start) % BUCKET_BYTES
            yield raw[start:stop]
            start = stop


def _write(bucket: Bytes, pieces: Sequence[Bytes]) -> int:
    """Fill a bucket. Each piece is hashed where it comes from and then copied out of the cache, which saves a trip."""
    hasher, end = xxhash.xxh3_64(), 0
    for piece in pieces:
        for start in range(0, piece.size, CACHED_BYTES):
            part = piece[start : start + CACHED_BYTES]
            hasher.update(part.data)
            bucket[end : end + part.size] = part
            end += part.size
    return hasher.intdigest()


def _digest(version: WeightsVersion) -> str:
    """Of the version's number, table and checksums: a swapped name is damage as much as a flipped bit."""
    table = [[entry.name, entry.dtype, list(entry.shape), entry.offset, entry.nbytes] for entry in version.tensors]
    said = [version.version, table, list(version.checksums), version.adapter_scale, version.rounded]
    return xxhash.xxh3_128_hexdigest(json.dumps(said, separators=(",", ":")).encode())
