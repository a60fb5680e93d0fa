"""What was paid for once: a teacher's answers on disk, and its scores in memory.

    AnswerStore   text that a teacher wrote, by the question that it was asked; outlives the run
    ScoreCache    scores of exactly these tokens by exactly this teacher, the latest that fit into memory

Neither decides what equals what: a question is its model, its parameters and its messages, byte for byte, and where it
was sent and with which key is no part of it. Neither asks a teacher by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import ConfigError
from potstill.types import IntArray, Message, ScoreStatus, TeacherIdentity, TeacherScores

_BUSY_S = 30.0  # another process writes one row at a time
_SCORES_OVERHEAD_BYTES = 1024  # objects around the arrays of one entry
_SCHEMA = """
create table if not exists answers (
    key text primary key,            -- sha256 of `request`
    request text not null,           -- canonical JSON: model, parameters, messages
    text text not null,
    finish_reason text not null,
    tokens_in integer not null,
    tokens_out integer not null,
    cost_usd text not null,          -- decimal
    created_at real not null         -- Unix time
) without rowid
"""
_READ = "select text, finish_reason, tokens_in, tokens_out, cost_usd from answers where key = ?"
_WRITE = "insert or ignore into answers values (?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a teacher is asked to write. Two samples for one prompt are two questions: number them in `parameters`.

    Example: Question(model="big-model@r1", parameters={"temperature": 0.7, "max_tokens": 512, "sample": 0},
                      messages=(Message(role="user", content="12 + 9 = ?"),))
    """

    model: str
    parameters: Mapping[str, Any]  # JSON values
    messages: Sequence[Message]

    @property
    def canonical(self) -> str:
        """The same text for the same question, whatever the order of its parameters. Raises ValueError for a NaN."""
        value = {
            "model": self.model,
            "parameters": dict(self.parameters),
            "messages": [asdict(message) for message in self.messages],
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def key(self) -> str:
        return hashlib.sha256(self.canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Paid:
    """An answer, and what it cost. Token counts are those that were charged for."""

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    cost_usd: str  # decimal, as Reservation.settle returns it


@dataclass(slots=True, kw_only=True)
class _Flight:
    """One question on its way to the teacher, and how many wait for it."""

    task: asyncio.Task[Paid]
    waiting: int = 0


class AnswerStore:
    """Answers in one SQLite file, which several processes of one machine may use. Lives in one event loop.

    A question is asked once within a process however many ask it at the same time. Two processes may both ask; the
    answer that is stored first is the one that both return. Raises ConfigError for a file that is something else.
    """

    def __init__(self, path: Path) -> None:
        self.hits = self.misses = 0
        self._flights: dict[str, _Flight] = {}
        self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        try:
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = normal")  # a power cut may cost the last answers, never the file
            self._db.execute(_SCHEMA)
        except sqlite3.DatabaseError:
            self._db.close()
            raise ConfigError(f"{path} is not a store of answers: name another file, or move it away") from None

    def close(self) -> None:
        self._db.close()

    def get(self, question: Question) -> Paid | None:
        row = self._db.execute(_READ, (question.key,)).fetchone()
        if row is None:
            return None
        text, finish_reason, tokens_in, tokens_out, cost_usd = row
        return Paid(
            text=text, finish_reason=finish_reason, tokens_in=tokens_in, tokens_out=tokens_out, cost_usd=cost_usd
        )

    async def get_or_ask(self, question: Question, ask: Callable[[], Awaitable[Paid]]) -> Paid:
        """The stored answer, or that of `ask`, stored before it is returned. What `ask` raises is not stored.

        A caller that is cancelled leaves the others waiting; with the last of them the request itself is cancelled.
        """
        kept = self.get(question)
        if kept is not None:
            self.hits += 1
            return kept
        key = question.key
        if key not in self._flights:
            self.misses += 1
            self._flights[key] = _Flight(task=asyncio.create_task(self._ask(question, ask)))
        else:
            self.hits += 1
        flight = self._flights[key]
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if flight.waiting == 0:
                del self._flights[key]
                flight.task.cancel()

    async def _ask(self, question: Question, ask: Callable[[], Awaitable[Paid]]) -> Paid:
        written = await ask()
        self._db.execute(_WRITE, (question.key, question.canonical, *astuple(written), time.time()))
        kept = self.get(question)  # another process may have been first
        return written if kept is None else kept


class ScoreCache:
    """The most recently used scores that fit into `max_bytes`. What it returns is shared and read-only."""

    def __init__(self, max_bytes: int) -> None:
        self.hits = self.misses = self.evictions = 0
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._scores: OrderedDict[bytes, TeacherScores] = OrderedDict()

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, key: bytes) -> TeacherScores | None:
        """`key` comes from `score_key`."""
        scores = self._scores.get(key)
        if scores is None:
            self.misses += 1
            return None
        self.hits += 1
        self._scores.move_to_end(key)
        return scores

    def put(self, key: bytes, scores: TeacherScores) -> None:
        """Keep a copy. Scores that are missing are not kept, so that they are asked for again."""
        if scores.status != ScoreStatus.OK:
            return
        self._drop(key)
        own = _copied(scores)
        self._scores[key] = own
        self.num_bytes += _num_bytes(own)
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._scores)))
            self.evictions += 1

    def _drop(self, key: bytes) -> None:
        if key in self._scores:
            self.num_bytes -= _num_bytes(self._scores.pop(key))


def score_key(
    *,
    identity: TeacherIdentity,
    context_ids: IntArray,
    completion_ids: IntArray,
    chosen_ids: IntArray | None,
    asked: str,
) -> bytes:
    """16 bytes that stand for one question to one teacher.

    context_ids [C] is what the teacher reads, chosen_ids [T, K] what the caller chose; `asked` is everything else that
    the answer depends on, e.g. repr of wire.Ask and a seed. Every part is hashed with its length.
    """
    digest = hashlib.blake2b(digest_size=16)
    texts = (identity.name, identity.revision, identity.tokenizer_fingerprint, asked)
    for part in (*(text.encode() for text in texts), *map(_bytes_of, (context_ids, completion_ids, chosen_ids))):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _bytes_of(ids: IntArray | None) -> bytes:
    if ids is None:
        return b""
    return repr(ids.shape).encode() + np.ascontiguousarray(ids, dtype="<i4").tobytes()


def _copied(scores: TeacherScores) -> TeacherScores:
    """Arrays of its own: those of an answer are views that would keep the whole answer alive."""
    arrays: dict[str, Any] = {name: array.copy() for name, array in _arrays(scores)}
    for array in arrays.values():
        array.setflags(write=False)
    return replace(scores, **arrays)


def _num_bytes(scores: TeacherScores) -> int:
    return _SCORES_OVERHEAD_BYTES + sum(array.nbytes for _, array in _arrays(scores))


def _arrays(scores: TeacherScores) -> list[tuple[str, np.ndarray[Any, Any]]]:
    values = ((one.name, getattr(scores, one.name)) for one in fields(scores))
    return [(name, value) for name, value in values if isinstance(value, np.ndarray)]
