"""Only what changed since the version before, around any transport that keeps two versions. Nothing is lost.

    delta   [ one bit per two bytes of the payload: changed? | the changed ones, in order ]

It pays where most weights stay as they are to the bit, which bfloat16 weights do under a small learning rate: an
update below 1/512 of a weight rounds back to it. Float32 weights nearly all change; a delta that would be as large as
the payload is not sent. Whoever does not hold the version before takes the whole payload, which is always there too.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import numpy as np

from potstill.errors import WeightsError
from potstill.transports import Kept, Payload, Transport
from potstill.weights import Bytes, buckets

HELD = "delta"  # in a receiver's memory: stream, version, bytes


@dataclass(frozen=True, slots=True)
class DeltaPayload:
    """`whole`, or for those who hold version `base` of the same stream, `changes` to it."""

    whole: Payload
    changes: Payload | None
    stream: str
    base: int
    version: int

    def open(self, kept: Kept) -> Bytes:
        stream, version, held = kept.get(HELD, (None, -1, None))
        if self.changes is not None and (stream, version) == (self.stream, self.base):
            payload = patched(held, self.changes.open(kept))
        else:
            payload = self.whole.open(kept)
        kept[HELD] = (self.stream, self.version, payload)
        return payload


class Delta:
    """Around `inner`, which carries the wholes and the deltas."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._stream = uuid.uuid4().hex
        self._base = -1
        self._sent: Bytes = np.empty(0, np.uint8)  # as version `base` was
        self._buffer: Bytes = np.empty(0, np.uint8)

    def room(self, nbytes: int) -> Bytes:
        if self._buffer.size != nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer

    def send(self, payload: Bytes, version: int) -> DeltaPayload:
        changes = None
        if self._sent.size == payload.size:
            delta = difference(self._sent, payload)
            if delta.size < payload.size:
                changes = self._send(delta, version)
        sent = DeltaPayload(self._send(payload, version), changes, self._stream, self._base, version)
        self._sent, self._buffer = self._buffer, self._sent
        self._base = version
        return sent

    def close(self) -> None:
        self._inner.close()
        self._sent = self._buffer = np.empty(0, np.uint8)

    def _send(self, content: Bytes, version: int) -> Payload:
        room = self._inner.room(content.size)
        room[:] = content
        return self._inner.send(room, version)


def difference(old: Bytes, new: Bytes) -> Bytes:
    """What makes `new` of `old`, which has as many bytes."""
    masks, values = [], []
    for part in buckets(new.size):
        pair = new[part].view(np.uint16)
        changed = old[part].view(np.uint16) != pair
        masks.append(np.packbits(changed))
        values.append(pair[changed].view(np.uint8))
    return np.concatenate((*masks, *values))


def patched(old: Bytes, delta: Bytes) -> Bytes:
    """A copy of `old` with the changes laid over it. Raises WeightsError for a delta of another size."""
    new = old.copy()
    at = sum(-(-(part.stop - part.start) // 16) for part in buckets(old.size))
    if delta.size < at:
        raise WeightsError(f"a delta of {delta.size} bytes cannot be of a payload of {old.size}")
    mask_at = 0
    for part in buckets(old.size):
        pair = new[part].view(np.uint16)
        width = -(-pair.size // 8)
        changed = np.unpackbits(delta[mask_at : mask_at + width], count=pair.size).view(np.bool_)
        count = 2 * int(np.count_nonzero(changed))
        if at + count > delta.size:
            raise WeightsError("a delta ends before all of its changes")
        pair[changed] = np.frombuffer(delta[at : at + count].tobytes(), np.uint16)
        mask_at, at = mask_at + width, at + count
    new.flags.writeable = False
    return new
