"""From a request to the jobs of its items, or a Refusal that names the item and the field.

Everything that this teacher cannot do is said here, before anything is queued: another model, another tokenizer, too
many tokens, ids it does not know, contexts that do not fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from potstill.algebra.objective import Tier
from potstill.tokenization import render
from potstill.types import IntArray, TeacherIdentity
from potstill.wire import Ask, Capabilities, ScoreItem, ScoreRequest
from teacher_server.batching import Job
from teacher_server.limits import Limits, Refusal


class Teacher(Protocol):
    """What admission must know of a teacher."""

    identity: TeacherIdentity
    vocabulary: int
    context_length: int
    hidden_size: int
    head_id: str
    tokenizer: PreTrainedTokenizerBase


def capabilities(teacher: Teacher, limits: Limits) -> Capabilities:
    """What this server says it can do, and then does."""
    return Capabilities(
        model=teacher.identity.name,
        revision=teacher.identity.revision,
        tokenizer_fingerprint=teacher.identity.tokenizer_fingerprint,
        tier=Tier.FULL,
        context_length=teacher.context_length,
        vocabulary=teacher.vocabulary,
        max_items=limits.max_items,
        max_tokens=limits.max_tokens,
        max_top_k=min(limits.max_top_k, teacher.vocabulary),
        max_body_bytes=limits.max_body_bytes,
        hidden_size=teacher.hidden_size,
        head_id=teacher.head_id,
    )


def admit(request: ScoreRequest, teacher: Teacher, limits: Limits) -> list[Job]:
    """One job per item, in order. Raises Refusal when any part of the request cannot be served."""
    _check_expectations(request, teacher.identity)
    able = capabilities(teacher, limits)
    if len(request.items) > able.max_items:
        raise Refusal(
            413, "request_too_large", f"{len(request.items)} items; at most {able.max_items} at a time", "items"
        )
    for name in ("top_k", "num_ids", "draws"):
        if (value := getattr(request.ask, name)) > able.max_top_k:
            raise Refusal(400, "invalid_value", f"{name} is {value}; at most {able.max_top_k} here", name)
    if request.ask.draws and request.ask.top_k == able.vocabulary:
        raise Refusal(400, "invalid_value", "a top-k of the whole vocabulary leaves nothing to draw from", "draws")
    if request.ask.hidden not in {0, able.hidden_size}:
        raise Refusal(400, "invalid_value", f"this teacher's states are {able.hidden_size} wide", "hidden")
    jobs = [_job(item, f"items[{index}]", request, teacher, able) for index, item in enumerate(request.items)]
    num_tokens = sum(len(job.input_ids) for job in jobs)
    if num_tokens > able.max_tokens:
        raise Refusal(413, "request_too_large", f"{num_tokens} tokens; at most {able.max_tokens} at a time", "items")
    return jobs


def check_revision(request: ScoreRequest, identity: TeacherIdentity) -> None:
    """Raise Refusal unless these are the weights that the client expects.

    Asked twice, before the queue and of the scores: new weights may have been loaded in between.
    """
    if request.expect_revision not in {None, identity.revision}:
        message = f"the teacher's weights are revision {identity.revision}, not the one expected"
        raise Refusal(412, "revision_mismatch", message, "expect_revision")


def check_json_answer(jobs: Sequence[Job], limits: Limits) -> None:
    """Raise Refusal when the answer to `jobs` is too large to be written as JSON."""
    num_numbers = sum(len(job.completion_ids) * _numbers_per_token(job.ask) for job in jobs)
    if num_numbers > limits.max_json_numbers:
        message = (
            f"the answer has {num_numbers} numbers; at most {limits.max_json_numbers} as JSON, safetensors has more"
        )
        raise Refusal(413, "request_too_large", message, "items")


def answer_bytes(jobs: Sequence[Job]) -> int:
    """Upper bound of what the scores of `jobs` take."""
    return sum(len(job.completion_ids) * 4 * _numbers_per_token(job.ask) for job in jobs)


def _numbers_per_token(ask: Ask) -> int:
    """Of an answer, each of four bytes at most: log-probs, tails and an entropy, ids and log-probs, a state."""
    return 4 + 2 * (ask.top_k + ask.draws) + ask.num_ids + ask.hidden


def _check_expectations(request: ScoreRequest, identity: TeacherIdentity) -> None:
    if request.model != identity.name:
        raise Refusal(404, "model_not_found", "this server teaches another model; see /v1/models", "model")
    if request.expect_tokenizer_fingerprint not in {None, identity.tokenizer_fingerprint}:
        message = "the teacher's tokenizer is not the one expected: its token ids mean other text"
        raise Refusal(422, "tokenizer_mismatch", message, "expect_tokenizer_fingerprint")
    check_revision(request, identity)


def _job(item: ScoreItem, where: str, request: ScoreRequest, teacher: Teacher, able: Capabilities) -> Job:
    for name in ("context_ids", "completion_ids", "teacher_context_ids", "token_ids"):
        ids = getattr(item, name)
        if ids is not None and ids.size and ids.max() >= able.vocabulary:
            message = f"holds id {ids.max()}; this teacher's tokenizer has {able.vocabulary}"
            raise Refusal(400, "invalid_value", message, f"{where}.{name}")
    context = _context(item, where, teacher.tokenizer)
    input_ids = np.concatenate([context, item.completion_ids[:-1]])
    if len(input_ids) > able.context_length:
        message = f"context and completion make {len(input_ids)} tokens; this teacher reads {able.context_length}"
        raise Refusal(400, "context_length_exceeded", message, f"{where}.completion_ids")
    return Job(
        input_ids=input_ids,
        completion_ids=item.completion_ids,
        token_ids=item.token_ids,
        ask=request.ask,
        seed=_seed(request.seed, item.id),
    )


def _seed(seed: int, item_id: str) -> int:
    """Of one item's draws: with one seed for all, items that are alike would draw alike, and nothing averages out."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item_id}".encode()).digest()[:8], "big")


def _context(item: ScoreItem, where: str, tokenizer: PreTrainedTokenizerBase) -> IntArray:
    """What the teacher reads before the completion: its own ids, its own messages, or the student's context."""
    if item.teacher_context_ids is not None:
        return item.teacher_context_ids
    if item.teacher_messages is None:
        return item.context_ids
    try:
        return np.array(render(tokenizer, item.teacher_messages), np.int32)
    except TemplateError:
        message = "the teacher's chat template refuses these messages"
        raise Refusal(400, "invalid_value", message, f"{where}.teacher_messages") from None
