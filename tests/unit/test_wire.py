"""Scoring messages survive both encodings unchanged, and damaged ones are refused by the name of the field."""

from __future__ import annotations

import json
import struct
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from potstill.codec import JSON, SAFETENSORS, decode_request, decode_response, encode_request, encode_response
from potstill.framing import METADATA_KEY
from potstill.types import Message, TeacherScores
from potstill.wire import Ask, ScoreItem, ScoreRequest, ScoreResponse, WireError
from tests.builders_teacher import failed_scores, ids, item, request, sound_response

BOTH = pytest.mark.parametrize("media_type", [JSON, SAFETENSORS])
EVERYTHING = Ask(top_k=3, num_ids=2, draws=4, entropy=True, hidden=5)


def same(left: Any, right: Any) -> bool:
    """Equality of two messages, arrays by value and dtype, NaN equal to NaN."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if isinstance(left, ScoreRequest | ScoreItem | ScoreResponse | TeacherScores):
        return all(same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    if isinstance(left, tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


def doctored(body: bytes, *, head: dict[str, Any] | None = None, **arrays: np.ndarray | None) -> bytes:
    """A safetensors message with some of its arrays (None: dropped) or head fields replaced."""
    (size,) = struct.unpack_from("<Q", body)
    text = json.loads(body[8 : 8 + size])["__metadata__"][METADATA_KEY]
    kept = {**safetensors.numpy.load(body), **arrays}
    whole = {name: array for name, array in kept.items() if array is not None}
    return safetensors.numpy.save(whole, {METADATA_KEY: json.dumps(json.loads(text) | (head or {}))})


def refused_param(body: bytes, media_type: str, *, decode: Any = decode_request) -> str:
    with pytest.raises(WireError) as caught:
        decode(body, media_type)
    return caught.value.param


@BOTH
def test_a_request_with_every_field_comes_back_unchanged(media_type):
    asked = ScoreRequest(
        model="tiny",
        items=(
            item("a", token_ids=[[1, 2], [3, 4], [5, 6]]),
            item("b", completion=(7,), teacher_context=(9, 9, 9, 9), token_ids=[[0, 8]]),
            item("c", context=(), messages=(Message(role="user", content="é \n?"),), token_ids=[[1, 2]] * 3),
        ),
        ask=EVERYTHING,
        seed=7,
        expect_tokenizer_fingerprint="f",
        expect_revision="r",
        deadline_ms=1500,
    )
    assert same(decode_request(encode_request(asked, media_type), media_type), asked)


@BOTH
def test_a_response_with_every_field_comes_back_unchanged(media_type):
    asked = request(
        item("a", token_ids=[[0, 1], [2, 3], [4, 5]]),
        item("b", completion=(7,), token_ids=[[6, 7]]),
        ask=EVERYTHING,
    )
    answer = sound_response(asked)
    assert same(decode_response(encode_response(answer, media_type), media_type), answer)


@BOTH
def test_missing_scores_stay_nan_and_an_empty_tail_stays_minus_infinity(media_type):
    asked = request(item("a"), ask=Ask(top_k=8))  # all eight tokens: nothing is left for the tail
    answer = sound_response(asked)
    assert (answer.scores[0].topk_tail == -np.inf).all()
    failed = replace(answer, scores=(failed_scores(item()),))
    for message in (answer, failed):
        assert same(decode_response(encode_response(message, media_type), media_type), message)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
            st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_ragged_requests_of_any_lengths_survive_both_encodings(rows):
    items = tuple(item(str(i), context=context, completion=done) for i, (context, done) in enumerate(rows))
    asked = request(*items)
    for media_type in (JSON, SAFETENSORS):
        assert same(decode_request(encode_request(asked, media_type), media_type), asked)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"completion_ids": None}, "completion_ids"),
        ({"completion_ids": np.arange(3)}, "completion_ids"),
        ({"completion_ids": ids(1, 2)}, "completion_ids"),
        ({"context_offsets": np.array([0, 3, 2])}, "context_offsets"),
        ({"context_offsets": np.array([1, 2])}, "context_offsets"),
        ({"context_offsets": np.array([0, 1])}, "context_ids"),
        ({"context_ids": ids(1, -2)}, "items[0].context_ids"),
        ({"completion_ids": np.ones((3, 1), np.int32)}, "completion_ids"),
        ({"surprise": ids(1)}, "surprise"),
        ({"head": {"schema_version": 1}}, "schema_version"),
        ({"head": {"entropy": 3}}, "entropy"),
        ({"head": {"num_ids": 2}}, "items[0].token_ids"),
        ({"head": {"surprise": 1}}, "surprise"),
        ({"head": {"temperature": 0.7}}, "temperature"),
        ({"head": {"top_k": -3}}, "top_k"),
        ({"head": {"deadline_ms": 0}}, "deadline_ms"),
        ({"head": {"items": []}}, "context_offsets"),
    ],
)
def test_a_damaged_safetensors_request_names_the_field(changes, param):
    assert refused_param(doctored(encode_request(request(), SAFETENSORS), **changes), SAFETENSORS) == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 50_000) + b"[" * 50_000,
        encode_request(request(), SAFETENSORS)[:-2],
    ],
)
def test_bytes_that_are_not_safetensors_are_refused_before_anything_is_allocated(body):
    assert refused_param(body, SAFETENSORS) == "body"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"id": ""}, "items[0].id"),
        ({"completion_ids": []}, "items[0].completion_ids"),
        ({"completion_ids": [1, -1]}, "items[0].completion_ids"),
        ({"completion_ids": [1.5]}, "items[0].completion_ids"),
        ({"completion_ids": ["1"]}, "items[0].completion_ids"),
        ({"completion_ids": [2**31]}, "items[0].completion_ids"),
        ({"context_ids": []}, "items[0].context_ids"),
        ({"teacher_context_ids": []}, "items[0].teacher_context_ids"),
        (
            {"teacher_context_ids": [1], "teacher_messages": [{"role": "user", "content": ""}]},
            "items[0].teacher_messages",
        ),
        ({"teacher_messages": [{"role": "user"}]}, "items[0].teacher_messages"),
        ({"token_ids": [[1], [2, 3], [4]]}, "items[0].token_ids"),
        ({"token_ids": [[1], [2]]}, "items[0].token_ids"),
        ({"token_ids": [[1, 1], [2, 3], [4, 5]]}, "items[0].token_ids"),
        ({"token_ids": [[], [], []]}, "items[0].token_ids"),
        ({"token_ids": None}, "items[0].token_ids"),
        ({"colour": "blue"}, "items[0].colour"),
    ],
)
def test_a_wrong_json_item_names_the_item_and_the_field(change, param):
    right = {"id": "a", "context_ids": [1], "completion_ids": [2, 3, 4], "token_ids": [[1], [2], [3]]}
    body = json.dumps({"model": "tiny", "num_ids": 1, "items": [right | change]})
    assert refused_param(body.encode(), JSON) == param


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'{"model": NaN}', b"\xff\xfe"])
def test_bytes_that_are_not_json_are_refused(body):
    assert refused_param(body, JSON) in {"body", "model"}


def test_items_must_differ_in_id_and_agree_in_the_number_of_given_ids():
    with pytest.raises(WireError, match="same id"):
        request(item("a"), item("a"))
    with pytest.raises(WireError, match="num_ids = 1"):
        request(item("a", token_ids=[[1], [2], [3]]), item("b", token_ids=[[1, 2]] * 3), ask=Ask(num_ids=1))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"sampled": None}, "sampled"),
        ({"sampled": np.zeros(3)}, "sampled"),
        ({"sampled": np.zeros(2, np.float32)}, "sampled"),
        ({"status": np.array([7], np.uint8)}, "status"),
        ({"status": np.array([0, 0], np.uint8)}, "status"),
        ({"offsets": np.array([0, -1])}, "offsets"),
        ({"topk_tail": None}, "topk_ids"),
        ({"head": {"ids": ["a", "b"]}}, "status"),
        ({"head": {"schema_version": 9}}, "schema_version"),
        ({"head": {"revision": None}}, "revision"),
    ],
)
def test_a_damaged_response_names_the_field(changes, param):
    asked = request(item("a"), ask=Ask(top_k=2))
    body = doctored(encode_response(sound_response(asked), SAFETENSORS), **changes)
    assert refused_param(body, SAFETENSORS, decode=decode_response) == param


def test_a_json_response_whose_rows_differ_in_number_names_the_field():
    answer = json.loads(encode_response(sound_response(request(ask=Ask(entropy=True))), JSON))
    answer["items"][0]["entropy"].pop()
    assert refused_param(json.dumps(answer).encode(), JSON, decode=decode_response) == "items[0].entropy"
