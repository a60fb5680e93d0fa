"""Scoring requests and answers to bytes and back, in two encodings of the same messages.

`application/x-safetensors`: ragged arrays laid end to end, item b at rows offsets[b]:offsets[b+1], and all that is not
an array as one JSON object under the key "potstill" of the header's metadata.
`application/json`: nested lists, for curl; null for NaN and "-Infinity" for a tail with nothing in it.

    request    context_offsets[B+1] i64           context_ids[.] i32
               completion_offsets[B+1] i64        completion_ids[N] i32        token_ids[N,K] i32
               teacher_context_offsets[B+1] i64   teacher_context_ids[.] i32   (an item with no rows has none)
    response   offsets[B+1] i64   status[B] u8    sampled[N] f32               entropy[N] f32
               topk_ids[N,k] i32                  topk_logprobs[N,k] f32       topk_tail[N] f32
               ids_logprobs[N,K] f32              ids_tail[N] f32
               drawn_ids[N,M] i32                 drawn_logprobs[N,M] f32      hidden[N,H] u16, bits of bfloat16

Bytes that are not such a message raise WireError, which names the field. Whether a message makes sense is wire.py's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter

from potstill.framing import (
    Arrays,
    Column,
    Part,
    bounds,
    floats_from_list,
    halves_from_list,
    ids_from_list,
    join,
    pack,
    parse,
    plain,
    require,
    unpack,
)
from potstill.types import IntArray, Message, ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import SCHEMA_VERSION, Ask, ScoreItem, ScoreRequest, ScoreResponse

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"

_NO_IDS: IntArray = np.empty(0, np.int32)
_RAGGED = ("context", "completion", "teacher_context")
_REQUEST_COLUMNS = {
    **{f"{name}_offsets": Column("I64", 1, required=True) for name in _RAGGED},
    **{f"{name}_ids": Column("I32", 1, required=True) for name in _RAGGED},
    "token_ids": Column("I32", 2),
}
_SCORE_COLUMNS = {
    "sampled": Column("F32", 1, required=True),
    "topk_ids": Column("I32", 2),
    "topk_logprobs": Column("F32", 2),
    "topk_tail": Column("F32", 1),
    "ids_logprobs": Column("F32", 2),
    "ids_tail": Column("F32", 1),
    "entropy": Column("F32", 1),
    "drawn_ids": Column("I32", 2),
    "drawn_logprobs": Column("F32", 2),
    "hidden": Column("U16", 2),
}
_RESPONSE_COLUMNS = {
    "offsets": Column("I64", 1, required=True),
    "status": Column("U8", 1, required=True),
    **_SCORE_COLUMNS,
}
_TOGETHER = (
    frozenset({"topk_ids", "topk_logprobs", "topk_tail"}),
    frozenset({"ids_logprobs", "ids_tail"}),
    frozenset({"drawn_ids", "drawn_logprobs"}),
)
_STATUSES = {ScoreStatus.OK, ScoreStatus.FAILED, ScoreStatus.DEADLINE}

_Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Tokens = Annotated[list[_Token], Field(fail_fast=True)]  # a message about the first wrong one of a million is enough
_Id = Annotated[str, Field(min_length=1, max_length=256)]
_Item = TypeVar("_Item")


class _MessagePart(Part):
    role: str
    content: str


class _HeadedItem(Part):
    id: _Id
    teacher_messages: Annotated[tuple[_MessagePart, ...], Field(fail_fast=True)] | None = None


class _ListedItem(_HeadedItem):
    context_ids: _Tokens = Field(default_factory=list)
    completion_ids: _Tokens
    teacher_context_ids: _Tokens | None = None
    token_ids: Annotated[list[_Tokens], Field(fail_fast=True)] | None = None


class _RequestFacts(Part, Generic[_Item]):
    schema_version: Literal[2] = 2
    model: str
    items: Annotated[list[_Item], Field(fail_fast=True)]
    top_k: int = 0
    num_ids: int = 0
    draws: int = 0
    entropy: bool = False
    hidden: int = 0
    seed: int = 0
    temperature: float = 1.0
    expect_tokenizer_fingerprint: str | None = None
    expect_revision: str | None = None
    deadline_ms: int | None = None


class _ResponseFacts(Part):
    schema_version: Literal[2]
    request_id: str
    model: str
    revision: str
    tokenizer_fingerprint: str


class _HeadedResponse(_ResponseFacts):
    ids: list[_Id]


class _ListedScores(Part):
    id: _Id
    status: int
    sampled: list[float | None]
    topk_ids: list[list[int]] | None = None
    topk_logprobs: list[list[float | None]] | None = None
    topk_tail: list[float | None] | None = None
    ids_logprobs: list[list[float | None]] | None = None
    ids_tail: list[float | None] | None = None
    entropy: list[float | None] | None = None
    drawn_ids: list[list[int]] | None = None
    drawn_logprobs: list[list[float | None]] | None = None
    hidden: list[list[int]] | None = None


class _ListedResponse(_ResponseFacts):
    items: list[_ListedScores]


_HEADED_REQUEST: TypeAdapter[_RequestFacts[_HeadedItem]] = TypeAdapter(_RequestFacts[_HeadedItem])
_LISTED_REQUEST: TypeAdapter[_RequestFacts[_ListedItem]] = TypeAdapter(_RequestFacts[_ListedItem])
_HEADED_RESPONSE = TypeAdapter(_HeadedResponse)
_LISTED_RESPONSE = TypeAdapter(_ListedResponse)


_FROM_LIST: dict[str, Callable[[Any, str], Any]] = {
    "I32": ids_from_list,
    "F32": floats_from_list,
    "U16": halves_from_list,
}


# ------------------------------------------------------------------------------------------------------ requests


def encode_request(request: ScoreRequest, media_type: str) -> bytes:
    """Bytes of a request; nothing is lost in either encoding."""
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": request.model,
        **asdict(request.ask),
        "seed": request.seed,
        "temperature": request.temperature,
        "expect_tokenizer_fingerprint": request.expect_tokenizer_fingerprint,
        "expect_revision": request.expect_revision,
        "deadline_ms": request.deadline_ms,
    }
    if media_type == JSON:
        return json.dumps(facts | {"items": [_listed(item) for item in request.items]}).encode()
    arrays: Arrays = {}
    for name in _RAGGED:
        rows = [getattr(item, f"{name}_ids") for item in request.items]
        arrays[f"{name}_offsets"], arrays[f"{name}_ids"] = join([_NO_IDS if ids is None else ids for ids in rows])
    chosen = [item.token_ids for item in request.items if item.token_ids is not None]
    if chosen:
        arrays["token_ids"] = np.concatenate(chosen)
    return pack(arrays, facts | {"items": [_headed(item) for item in request.items]})


def decode_request(body: bytes, media_type: str) -> ScoreRequest:
    """The request in `body`. Raises WireError naming the field that is wrong."""
    if media_type == JSON:
        listed = parse(_LISTED_REQUEST, body, "body")
        return _request(listed, [_from_lists(item, f"items[{index}]") for index, item in enumerate(listed.items)])
    arrays, text = unpack(body, _REQUEST_COLUMNS)
    head = parse(_HEADED_REQUEST, text, "metadata")
    rows = {name: _split(arrays, f"{name}_ids", f"{name}_offsets", len(head.items)) for name in _RAGGED}
    chosen: Sequence[IntArray | None] = [None] * len(head.items)
    if "token_ids" in arrays:
        chosen = _split(arrays, "token_ids", "completion_offsets", len(head.items))
    items = [
        ScoreItem(
            id=item.id,
            context_ids=context,
            completion_ids=completion,
            teacher_context_ids=teacher_context if len(teacher_context) else None,
            teacher_messages=_messages(item),
            token_ids=ids,
        )
        for item, context, completion, teacher_context, ids in zip(
            head.items, rows["context"], rows["completion"], rows["teacher_context"], chosen, strict=True
        )
    ]
    return _request(head, items)


def _request(facts: _RequestFacts[Any], items: list[ScoreItem]) -> ScoreRequest:
    return ScoreRequest(
        model=facts.model,
        items=tuple(items),
        ask=Ask(
            top_k=facts.top_k,
            num_ids=facts.num_ids,
            draws=facts.draws,
            entropy=facts.entropy,
            hidden=facts.hidden,
        ),
        seed=facts.seed,
        temperature=facts.temperature,
        expect_tokenizer_fingerprint=facts.expect_tokenizer_fingerprint,
        expect_revision=facts.expect_revision,
        deadline_ms=facts.deadline_ms,
    )


def _headed(item: ScoreItem) -> dict[str, Any]:
    if item.teacher_messages is None:
        return {"id": item.id}
    messages = [{"role": message.role, "content": message.content} for message in item.teacher_messages]
    return {"id": item.id, "teacher_messages": messages}


def _listed(item: ScoreItem) -> dict[str, Any]:
    arrays = {
        name: getattr(item, name) for name in ("context_ids", "completion_ids", "teacher_context_ids", "token_ids")
    }
    return _headed(item) | {name: array.tolist() for name, array in arrays.items() if array is not None}


def _from_lists(item: _ListedItem, where: str) -> ScoreItem:
    own, chosen = item.teacher_context_ids, item.token_ids
    return ScoreItem(
        id=item.id,
        context_ids=ids_from_list(item.context_ids, f"{where}.context_ids"),
        completion_ids=ids_from_list(item.completion_ids, f"{where}.completion_ids"),
        teacher_context_ids=None if own is None else ids_from_list(own, f"{where}.teacher_context_ids"),
        teacher_messages=_messages(item),
        token_ids=None if chosen is None else ids_from_list(chosen, f"{where}.token_ids"),
    )


def _messages(item: _HeadedItem) -> tuple[Message, ...] | None:
    if item.teacher_messages is None:
        return None
    return tuple(Message(role=message.role, content=message.content) for message in item.teacher_messages)


def _split(arrays: Arrays, name: str, offsets: str, count: int) -> list[Any]:
    """The rows of a ragged array, one view per item."""
    ends = bounds(arrays, offsets, count)
    require(len(arrays[name]) == ends[-1], name, f"has {len(arrays[name])} rows, {offsets} ends at {ends[-1]}")
    return [arrays[name][start:end] for start, end in pairwise(ends)]


# ----------------------------------------------------------------------------------------------------- responses


def encode_response(response: ScoreResponse, media_type: str) -> bytes:
    """Bytes of an answer; nothing is lost in either encoding."""
    facts = {
        "schema_version": SCHEMA_VERSION,
        "request_id": response.request_id,
        "model": response.identity.name,
        "revision": response.identity.revision,
        "tokenizer_fingerprint": response.identity.tokenizer_fingerprint,
    }
    names = [name for name in _SCORE_COLUMNS if getattr(response.scores[0], name) is not None]
    if media_type == JSON:
        items = [
            {"id": item_id, "status": scores.status} | {name: plain(getattr(scores, name)) for name in names}
            for item_id, scores in zip(response.ids, response.scores, strict=True)
        ]
        return json.dumps(facts | {"items": items}, allow_nan=False).encode()
    arrays: Arrays = {name: np.concatenate([getattr(scores, name) for scores in response.scores]) for name in names}
    arrays["offsets"], _ = join([scores.sampled for scores in response.scores])
    arrays["status"] = np.array([scores.status for scores in response.scores], np.uint8)
    return pack(arrays, facts | {"ids": response.ids})


def decode_response(body: bytes, media_type: str) -> ScoreResponse:
    """The answer in `body`. Raises WireError naming the field that is wrong."""
    if media_type == JSON:
        listed = parse(_LISTED_RESPONSE, body, "body")
        rows = [_columns(item, f"items[{index}]") for index, item in enumerate(listed.items)]
        return _response(listed, [item.id for item in listed.items], [item.status for item in listed.items], rows)
    arrays, text = unpack(body, _RESPONSE_COLUMNS)
    head = parse(_HEADED_RESPONSE, text, "metadata")
    count = len(head.ids)
    require(len(arrays["status"]) == count, "status", f"has {len(arrays['status'])} values for {count} items")
    columns = {name: _split(arrays, name, "offsets", count) for name in _SCORE_COLUMNS if name in arrays}
    rows = [{name: column[index] for name, column in columns.items()} for index in range(count)]
    return _response(head, head.ids, arrays["status"].tolist(), rows)


def _columns(item: _ListedScores, where: str) -> dict[str, Any]:
    """The arrays of one item of a JSON answer, by field name."""
    given = {name: getattr(item, name) for name in _SCORE_COLUMNS if getattr(item, name) is not None}
    arrays = {name: _FROM_LIST[_SCORE_COLUMNS[name].dtype](value, f"{where}.{name}") for name, value in given.items()}
    for name, array in arrays.items():
        require(len(array) == len(item.sampled), f"{where}.{name}", "must have one row per completion token")
    return arrays


def _response(
    facts: _ResponseFacts, ids: Sequence[str], statuses: Sequence[int], rows: Sequence[dict[str, Any]]
) -> ScoreResponse:
    identity = TeacherIdentity(
        name=facts.model, revision=facts.revision, tokenizer_fingerprint=facts.tokenizer_fingerprint
    )
    require(bool(rows), "items", "must not be empty")
    require(all(row.keys() == rows[0].keys() for row in rows), "items", "must all have the same fields")
    for group in _TOGETHER:
        require(len(group & rows[0].keys()) in {0, len(group)}, min(group), f"belongs together with {sorted(group)}")
    require(_STATUSES.issuperset(statuses), "status", f"knows {sorted(_STATUSES)}")
    scores = tuple(
        TeacherScores(status=status, identity=identity, **row) for status, row in zip(statuses, rows, strict=True)
    )
    return ScoreResponse(request_id=facts.request_id, identity=identity, ids=tuple(ids), scores=scores)
