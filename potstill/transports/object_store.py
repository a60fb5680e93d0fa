"""Weights in Ray's object store: one copy on every host that a worker reads them on, moved by Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.errors import StaleWeights
from potstill.transports import Kept
from potstill.weights import Bytes


@dataclass(frozen=True, slots=True)
class ObjectPayload:
    """A reference to one flat array. It lives for as long as somebody holds the reference, and its owner lives."""

    ref: Any  # ray.ObjectRef

    def open(self, kept: Kept) -> Bytes:
        import ray

        try:
            found: Bytes = ray.get(self.ref)
        except ray.exceptions.ObjectLostError as error:
            raise StaleWeights("a weights version is lost with the process that published it") from error
        return found


class ObjectStore:
    """The learner's side. Ray copies what it is given, so that one buffer serves every version."""

    def __init__(self) -> None:
        self._buffer: Bytes = np.empty(0, np.uint8)

    def room(self, nbytes: int) -> Bytes:
        if self._buffer.size < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]

    def send(self, payload: Bytes, version: int) -> ObjectPayload:
        import ray

        return ObjectPayload(ray.put(payload))

    def close(self) -> None:
        self._buffer = np.empty(0, np.uint8)
