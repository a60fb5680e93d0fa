"""The digest of an output head: by it whoever holds a head knows that a teacher's states are for this one.

A teacher server names the digest of its head (Capabilities.head_id); who multiplies its states computes it once more.
Knows no tensors and no files: the head comes as rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from potstill.types import FloatArray

BLOCK_ROWS = 4096
"""Rows of a head that whoever hands them over need convert to float32 at a time."""
_DIGITS = 16


def head_digest(blocks: Iterable[FloatArray]) -> str:
    """First 16 hex digits of the sha256 over a head [V, H] as little-endian float32, row by row, however it is cut.

    A head in half precision and the same numbers in float32 have one digest: states fit both.
    """
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block.astype("<f4", order="C", copy=False).tobytes())
    return digest.hexdigest()[:_DIGITS]
