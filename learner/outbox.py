"""Weights from the learner's device to the workers': the learner's side. A worker's is potstill/transports/device.py.

    publish   room ◄── the student's weights, copied on the device          then the learner goes on learning
    a worker  calls ──► a thread of its own: build a link ──► "send 7" ──► give the room, piece by piece ──► "done"

There is one room, for one version: the next is written over it once nobody takes from it, so that the learner waits for
whoever is in the middle, and for nobody else. A worker that dies, hangs or refuses what came costs itself alone.
Listens on the learner's own address, and serves those who know the key of the payloads that it made.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from typing import Any

import torch
from torch import Tensor

from learner.parallel import meeting
from potstill.errors import WeightsError
from potstill.transports import links
from potstill.transports.device import PATIENCE_S, DevicePayload
from potstill.transports.line import Line
from potstill.transports.route import link_between
from potstill.transports.rows import padded
from potstill.types import TensorEntry

PIECE_BYTES = 64 << 20  # at least, and at most that and one tensor: a link is fast from about 1 MiB on
NOTHING = -1  # the version of a room that is being written


class Outbox:
    """One learner's, for one run."""

    def __init__(self, host: str, *, piece_bytes: int = PIECE_BYTES) -> None:
        """host: an address of this machine that workers reach; nothing listens on any other."""
        self._host = host
        self._piece_bytes = piece_bytes
        self._key = secrets.token_bytes(32)
        self._device = links.here()
        self._store = meeting(host)  # where the two members of a pair meet
        self._numbers = itertools.count()
        self._room = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._pieces: list[tuple[int, int]] = []
        self._version = NOTHING
        self._taking = 0  # workers
        self._change = threading.Condition()
        self._lines: set[Line] = set()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family, backlog=64)
        threading.Thread(target=self._answer, name="outbox", daemon=True).start()

    def room(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the student's device, where the next version is to be written. Waits for whoever takes
        from it. Raises WeightsError when the device has no memory for it."""
        with self._change:
            self._version = NOTHING
            if not self._change.wait_for(lambda: self._taking == 0, 2 * PATIENCE_S):
                raise WeightsError(f"{self._taking} workers take from the outbox and do not end")
        if self._room.numel() != nbytes:
            self._hang_up()  # what was mapped is not the room any more
            try:
                self._room = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError as error:
                raise WeightsError(
                    f"{self._device} has no {nbytes >> 20} MiB for a copy of the weights, which "
                    'weights.transport = "device" keeps there: write "auto", or wire = "bfloat16" for half of it'
                ) from error
        return self._room

    def send(self, version: int, tensors: Sequence[TensorEntry]) -> DevicePayload:
        """Let workers have what was written to the room, which holds these tensors."""
        self._pieces = pieces(tensors, self._piece_bytes)
        with self._change:
            self._version = version
        host, port = self._listening.getsockname()[:2]
        return DevicePayload(host, port, version, self._key)

    def close(self) -> None:
        """Whoever is taking is cut off."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes who listens
        self._listening.close()
        self._hang_up()
        self._room = torch.empty(0, dtype=torch.uint8)

    def _hang_up(self) -> None:
        for line in list(self._lines):
            line.hang_up()

    # Everything below runs on threads: one that listens, and one for every worker.

    def _answer(self) -> None:
        while True:
            try:
                connected, _ = self._listening.accept()
            except OSError:
                return  # closed
            line = Line(connected)
            self._lines.add(line)
            threading.Thread(target=self._serve, args=(line,), name="outbox to a worker", daemon=True).start()

    def _serve(self, line: Line) -> None:
        link: links.Link | None = None
        try:
            line.admit(self._key)
            link = self._linked(line, line.hear(PATIENCE_S))
            while True:
                self._hand_over(line, link, line.hear(None)["send"])
        except (OSError, EOFError, AuthenticationError):
            pass  # the worker is gone, or was none
        except RuntimeError as error:  # of the link
            with suppress(OSError):
                line.say(failed=str(error))
        finally:
            if link is not None:
                link.drop()
            line.hang_up()
            self._lines.discard(line)

    def _linked(self, line: Line, caller: dict[str, Any]) -> links.Link:
        kind = link_between(links.name_of(self._device), caller["device"])
        if kind == "ipc":
            shown = links.Shown(self._room)
            line.say(link=kind, handle=shown.handle, nbytes=self._room.numel())
            return shown
        number = next(self._numbers)
        line.say(link=kind, store=self._store.port, number=number)
        store = links.part_of(self._store, number)
        return links.Pair(kind, store, links.GIVER, device=self._device, address=line.here, limit_s=PATIENCE_S)

    def _hand_over(self, line: Line, link: links.Link, version: int) -> None:
        with self._held(version) as held:
            if held != version:
                line.say(stale="a newer one is being written" if held == NOTHING else f"the learner has {held} now")
                return
            line.say(pieces=self._pieces)
            for start, stop in self._pieces:
                link.give(self._room[start:stop])
            line.hear(PATIENCE_S)  # that it is done

    @contextmanager
    def _held(self, version: int) -> Iterator[int]:
        """The version in the room, which stays there meanwhile if it is the one that is asked for."""
        with self._change:
            held = self._version
            self._taking += held == version
        try:
            yield held
        finally:
            with self._change:
                self._taking -= held == version
                self._change.notify_all()


def pieces(tensors: Sequence[TensorEntry], at_least: int) -> list[tuple[int, int]]:
    """Cuts a payload between tensors. Each piece has `at_least` bytes, but for the last.

    >>> entry = lambda at, n: TensorEntry(name="", dtype="float32", shape=(n // 4,), offset=at, nbytes=n)
    >>> pieces([entry(0, 100), entry(128, 4), entry(192, 400)], at_least=150)
    [(0, 192), (192, 640)]
    """
    found, start = [], 0
    for entry in tensors:
        stop = entry.offset + padded(entry.nbytes)
        if stop - start >= at_least or entry is tensors[-1]:
            found.append((start, stop))
            start = stop
    return found
