"""POST /v1/weights?version=N: new weights for a self-teacher. There only when the server was started to take them.

The body is a safetensors file of the whole model, its metadata {"version": "N"} and, if the sender likes, {"sha256": …}
of all that follows the header. With ?ema_decay=d the teacher becomes d · old + (1 - d) · new, in float32.

Everything is checked before anything is touched. Jobs admitted before the push are scored with the old weights, later
ones with the new: no answer mixes them. Older and equal versions are refused, and so is a second push beside the first.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from fastapi import APIRouter, Request
from safetensors import SafetensorError, safe_open
from starlette.requests import ClientDisconnect
from torch import Tensor

from potstill.codec import SAFETENSORS
from potstill.errors import StaleWeights, TeacherUnavailable, WeightsError
from potstill.framing import MAX_HEADER_BYTES
from potstill.weights import check_newer, shapes_in
from teacher_server.limits import Refusal
from teacher_server.service import ScoringService, announced_bytes, client_left, media_type, too_large

_BYTES_OF = {"F32": 4, "F16": 2, "BF16": 2}
_WRITE_BYTES = 4 * 2**20


class Loadable(Protocol):
    """What a push needs of the teacher."""

    def load_weights(self, weights: Mapping[str, Tensor], *, revision: str) -> None:
        """All or nothing; raises WeightsError before anything is touched."""


class Versions:
    """The weights that the teacher has and may be given. `folder` is the model folder that it was loaded from.

    It keeps the latest weights, in float32 once they are an average: rounded to bfloat16, small steps would be lost.
    """

    def __init__(self, teacher: Loadable, folder: Path) -> None:
        self._teacher = teacher
        self._folder = folder
        self._shapes = shapes_in(folder)
        self._latest: Mapping[str, Tensor] | None = None  # None: those in the folder
        self._busy = False
        self.version = -1

    @property
    def max_body_bytes(self) -> int:
        return MAX_HEADER_BYTES + max(_BYTES_OF.values()) * sum(math.prod(shape) for shape in self._shapes.values())

    @contextmanager
    def turn(self, version: int) -> Iterator[None]:
        """The only push at a time. Raises StaleWeights, or Refusal when another one is under way."""
        check_newer(self.version, version)
        if self._busy:
            raise Refusal(503, "overloaded", "another version is being loaded; try again later", retry_after_s=1)
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def read(self, file: Path, version: int, ema_decay: float | None) -> Mapping[str, Tensor]:
        """The weights to load. Raises WeightsError when `file` is not a whole model of this shape, undamaged."""
        try:
            with safe_open(file, framework="pt") as pushed:
                self._check(pushed, version)
                _check_sha256(file, pushed.metadata())
                new = {name: pushed.get_tensor(name).clone() for name in self._shapes}
        except SafetensorError:
            raise WeightsError("the body is not a sound safetensors file") from None
        return new if ema_decay is None else self._averaged(new, ema_decay)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """On the scoring thread, between two batches."""
        self._teacher.load_weights(weights, revision=f"v{version}")
        self._latest, self.version = weights, version

    def _check(self, pushed: Any, version: int) -> None:
        if (pushed.metadata() or {}).get("version") != str(version):
            raise WeightsError(f"the file's metadata must say version {version}, as the query does")
        names = set(pushed.keys())
        for problem, strange in (("lack", self._shapes.keys() - names), ("have unknown", names - self._shapes.keys())):
            if strange:
                raise WeightsError(f"the weights {problem} {len(strange)} tensors, among them {min(strange)[:200]}")
        for name, shape in self._shapes.items():
            entry = pushed.get_slice(name)
            if tuple(entry.get_shape()) != shape or entry.get_dtype() not in _BYTES_OF:
                given = f"{entry.get_dtype()} {entry.get_shape()}"
                raise WeightsError(f"{name} is {given}, not {list(shape)} of {', '.join(_BYTES_OF)}")

    def _averaged(self, new: Mapping[str, Tensor], ema_decay: float) -> dict[str, Tensor]:
        old = _weights_in(self._folder, self._shapes) if self._latest is None else self._latest
        return {name: old[name].float().mul(ema_decay).add(new[name].float(), alpha=1 - ema_decay) for name in new}


def weights(versions: Versions, service: ScoringService) -> APIRouter:
    router = APIRouter()

    @router.post("/weights")
    async def push(request: Request, version: str = "", ema_decay: str | None = None) -> dict[str, object]:
        started = time.monotonic()
        number, decay = _version(version), _decay(ema_decay)
        media_type(request, SAFETENSORS)
        if announced_bytes(request, versions.max_body_bytes) is None:
            raise Refusal(411, "length_required", "send content-length", "content-length")
        try:
            with versions.turn(number), TemporaryDirectory(prefix="weights-") as folder:
                file = Path(folder) / "pushed.safetensors"
                await _receive(request, service, file, limit=versions.max_body_bytes)
                given = await service.aside(versions.read, file, number, decay)
                await asyncio.wrap_future(service.queue.between(partial(versions.load, given, number)))
        except StaleWeights:
            message = f"version {versions.version} is loaded; only a later one replaces it"
            raise Refusal(409, "stale_weights", message, "version") from None
        except WeightsError as error:
            raise Refusal(400, "invalid_weights", str(error), "body") from None
        except TeacherUnavailable:
            raise Refusal(503, "not_ready", "the scoring thread is not running", retry_after_s=5) from None
        return {"version": number, "revision": f"v{number}", "seconds": round(time.monotonic() - started, 6)}

    return router


def _version(given: str) -> int:
    if not (given.isascii() and given.isdecimal() and len(given) <= 18):
        raise Refusal(400, "invalid_value", "must be a whole number, 0 or above: /v1/weights?version=7", "version")
    return int(given)


def _decay(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        decay = float(given)
    except ValueError:
        decay = math.nan
    if not 0.0 <= decay < 1.0:
        raise Refusal(400, "invalid_value", "must be in [0, 1): how much of the old weights stays", "ema_decay")
    return decay


async def _receive(request: Request, service: ScoringService, file: Path, *, limit: int) -> None:
    """Write the body to `file`, never more than `limit` bytes of it."""
    size, waiting = 0, bytearray()
    try:
        async with asyncio.timeout(service.limits.max_deadline_s):
            with file.open("wb", buffering=0) as target:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        raise too_large(limit)
                    waiting += chunk
                    if len(waiting) >= _WRITE_BYTES:
                        await service.aside(target.write, bytes(waiting))
                        waiting.clear()
                await service.aside(target.write, bytes(waiting))
    except ClientDisconnect:
        raise client_left() from None
    except TimeoutError:
        raise Refusal(408, "request_timeout", "the weights did not arrive in time", retry_after_s=1) from None


def _check_sha256(file: Path, metadata: Mapping[str, str]) -> None:
    """Of the bytes behind the header, where the sender gave one: a hash cannot stand in what it is of."""
    if "sha256" not in metadata:
        return
    with file.open("rb") as content:
        content.seek(8 + int.from_bytes(content.read(8), "little"))
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != metadata["sha256"].lower():
        raise WeightsError("the weights are not those of their sha256: send them again")


def _weights_in(folder: Path, names: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name in names}  # noqa: SIM118
    return found
