"""Small scoring messages, and a real teacher server in a process of its own, for tests of both ends of the wire."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.types import IntArray, Message, ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, ScoreItem, ScoreRequest, ScoreResponse, unscored

KEY = "sesame"
NOTHING_MORE = Ask()  # than the log-probs of the completion's own tokens
IDENTITY = TeacherIdentity(name="tiny", revision="r1", tokenizer_fingerprint="f1")


def ids(*values: int) -> IntArray:
    return np.array(values, np.int32)


def item(
    item_id: str = "a",
    *,
    context: Sequence[int] = (1, 2),
    completion: Sequence[int] = (3, 4, 5),
    teacher_context: Sequence[int] | None = None,
    messages: tuple[Message, ...] | None = None,
    token_ids: Sequence[Sequence[int]] | None = None,
) -> ScoreItem:
    return ScoreItem(
        id=item_id,
        context_ids=ids(*context),
        completion_ids=ids(*completion),
        teacher_context_ids=None if teacher_context is None else ids(*teacher_context),
        teacher_messages=messages,
        token_ids=None if token_ids is None else np.array(token_ids, np.int32),
    )


def request(*items: ScoreItem, ask: Ask = NOTHING_MORE, deadline_ms: int | None = None) -> ScoreRequest:
    return ScoreRequest(model="tiny", items=items or (item(),), ask=ask, deadline_ms=deadline_ms)


def sound_scores(asked: ScoreItem, *, ask: Ask, seed: int = 0) -> TeacherScores:
    """What a right teacher might answer: scores of random distributions over 8 tokens, one per position."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(len(asked.completion_ids), 8))
    logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    order = np.argsort(-logprobs, axis=1).astype(np.int32)
    top_k, best = ask.top_k, order[:, : ask.top_k]
    drawn = order[:, top_k + random.integers(0, 8 - top_k, ask.draws)] if ask.draws else None
    chosen = asked.token_ids
    return TeacherScores(
        status=ScoreStatus.OK,
        identity=IDENTITY,
        sampled=_at(logprobs, asked.completion_ids[:, None])[:, 0],
        topk_ids=best if top_k else None,
        topk_logprobs=_at(logprobs, best) if top_k else None,
        topk_tail=_outside(logprobs, best) if top_k else None,
        ids_logprobs=None if chosen is None else _at(logprobs, chosen),
        ids_tail=None if chosen is None else _outside(logprobs, chosen),
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1) if ask.entropy else None,
        drawn_ids=drawn,
        drawn_logprobs=None if drawn is None else _at(logprobs, drawn),
        hidden=random.integers(0, 0x7F00, (len(logits), ask.hidden), dtype=np.uint16) if ask.hidden else None,
    )


def sound_response(asked: ScoreRequest, request_id: str = "q1") -> ScoreResponse:
    return ScoreResponse(
        request_id=request_id,
        identity=IDENTITY,
        ids=tuple(one.id for one in asked.items),
        scores=tuple(sound_scores(one, ask=asked.ask, seed=index) for index, one in enumerate(asked.items)),
    )


def failed_scores(asked: ScoreItem) -> TeacherScores:
    return unscored(IDENTITY, ScoreStatus.FAILED, num_tokens=len(asked.completion_ids), ask=NOTHING_MORE)


def _at(logprobs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.take_along_axis(logprobs, columns, axis=1)


def _outside(logprobs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    left = np.exp(logprobs)
    np.put_along_axis(left, columns, 0.0, axis=1)
    with np.errstate(divide="ignore"):
        return np.log(left.sum(axis=1))


@dataclass(frozen=True)
class ServerProcess:
    url: str
    process: subprocess.Popen[str]


@contextmanager
def teacher_server(model: Path, *options: str) -> Iterator[ServerProcess]:
    """`python -m teacher_server` on a free loopback port, ready; ended when the block is left."""
    command = [sys.executable, "-m", "teacher_server", str(model), "--key-env", "TEACHER_KEY", *options]
    environment = {**os.environ, "TEACHER_KEY": KEY, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        yield ServerProcess(url=json.loads(line)["url"], process=process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
