"""A safetensors file, judged by its header alone, before a library maps it.

Refuses a header that is larger than it may be or than the file, names a type that nobody knows, or places tensors over
each other, apart from each other or beyond the file's end. It reads no weight.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 100_000_000  # as safetensors itself has it
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def problem_in(path: Path) -> str | None:
    """What is wrong with the file's header, as the end of a sentence about it; None when it is sound.

    Raises OSError when the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            header, length = _header(file, size)
            _check_layout([_span(name, entry) for name, entry in header.items()], size - 8 - length)
        except _Unsound as error:
            return str(error)
    return None


class _Unsound(Exception):
    pass


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Its tensors by name, and its length in bytes."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise _Unsound("ends inside its header")
    if length > MAX_HEADER_BYTES:
        raise _Unsound(f"has a header of more than {MAX_HEADER_BYTES} bytes")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        raise _Unsound("has a header that is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.pop("__metadata__", {}), dict):
        raise _Unsound("has a header that is no table of tensors")
    return header, length


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Unsound("names something twice in its header")
    return found


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Unsound(f"has no type, shape and place for {name[:100]!r}")
    bits, shape, offsets = _BITS.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if bits is None:
        raise _Unsound(f"has a tensor of a type that is not known, {name[:100]!r}")
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise _Unsound(f"has no shape and place in whole numbers for {name[:100]!r}")
    begin, end = offsets
    if 8 * (end - begin) != bits * math.prod(shape):
        raise _Unsound(f"has a place for {name[:100]!r} that is not as large as its shape")
    return begin, end


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(spans: list[tuple[int, int]], num_bytes: int) -> None:
    """The tensors must fill the bytes behind the header: no two overlap, nothing is between them or beyond the end."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise _Unsound("has tensors that overlap" if begin < at else "has bytes that belong to no tensor")
        at = end
    if at != num_bytes:
        raise _Unsound("ends inside a tensor" if at > num_bytes else "has bytes that belong to no tensor")
