"""How the bytes of a weights version get from one learner to many workers: one file a way, one interface for all.

    learner   publisher.publish(tensors, n)  ──►  WeightsVersion n, its payload a small slip that travels by any message
    worker    version.payload.open(kept)     ──►  the bytes, read-only; potstill/weights.py checks and unpacks them

No file here knows a model or, but for rows.py, a checksum. What is opened stays as it is for as long as the array, or a
view into it, lives. Ray is imported by those who use its object store, when they do.

From device to device there are no bytes in memory that could be handed out: device.py has a slip of its own kind, which
opens a Stream. It alone needs torch, through links.py and rows.py.
"""

from __future__ import annotations

from typing import Any, Protocol

from potstill.weights import Bytes

Kept = dict[str, Any]
"""A receiver's own memory between two versions, empty at first: mappings, and what a delta is laid over."""


class Payload(Protocol):
    """A small picklable slip that knows where its bytes are."""

    def open(self, kept: Kept) -> Bytes:
        """The bytes [num_bytes], read-only. Blocks; may be called in any thread, one at a time with the same `kept`.

        Raises StaleWeights when they are no longer kept: the newest version has taken their place.
        """
        ...


class Transport(Protocol):
    """The sending side of one way. Used by one thread at a time."""

    def room(self, nbytes: int) -> Bytes:
        """Where the next version is to be written. Raises WeightsError when there is no room for so many bytes."""
        ...

    def send(self, payload: Bytes, version: int) -> Payload:
        """Let receivers have what was written to the room. The room belongs to the transport again."""
        ...

    def close(self) -> None:
        """Free what was sent. What receivers have open stays theirs."""
        ...
