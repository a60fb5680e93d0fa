"""Tokens of two tokenizers are put together where they write the same bytes, and nowhere else."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from potstill.byte_alignment import (
    MAX_CHUNK_TOKENS,
    Alignment,
    align,
    byte_vocabulary,
    chunk_scores,
    map_topk,
    token_bytes,
    translation,
    whole_chunks,
)
from potstill.errors import AlignmentError, ConfigError
from tests.two_tokenizers import byte_level, pieces

AWKWARD = ["", "a", " a", "  b", "\ufeffBOM", "line\r\nend", "日本語", "👩‍🚀🇯🇵", "é", "e\u0301", "\t", "12 + 9 = 21"]
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=5)), max_size=6).map("".join)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """Pieces of at least one byte, inside characters too."""
    ends = sorted({place for place in places if 0 < place < len(data)})
    return [data[i:j] for i, j in zip([0, *ends], [*ends, len(data)], strict=True) if j > i]


@st.composite
def two_readings(draw: Any) -> tuple[list[bytes], list[bytes]]:
    data = draw(texts.map(str.encode).filter(bool))
    places = st.lists(st.integers(1, len(data)), max_size=len(data))
    return cut(data, draw(places)), cut(data, draw(places))


def slowly(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[list[int], list[int]]]:
    """Groups by walking: the side that has written less goes on, until both have written as much."""
    found, groups = ([], []), []
    i = j = written = read = 0
    while i < len(student) or j < len(teacher):
        if written <= read and i < len(student):
            found[0].append(i)
            written += len(student[i])
            i += 1
        else:
            found[1].append(j)
            read += len(teacher[j])
            j += 1
        if written == read:
            groups.append(found)
            found = ([], [])
    return groups


@settings(deadline=None)
@given(two_readings())
def test_groups_partition_both_readings_and_write_the_same_bytes(readings: tuple[list[bytes], list[bytes]]) -> None:
    student, teacher = readings
    found = align(student, teacher, ended=False)
    groups = [
        tuple(np.flatnonzero(side == group).tolist() for side in (found.student, found.teacher))
        for group in range(found.num_groups)
    ]
    assert [i for own, _ in groups for i in own] == list(range(len(student)))
    assert [j for _, other in groups for j in other] == list(range(len(teacher)))
    for own, other in groups:
        assert b"".join(student[i] for i in own) == b"".join(teacher[j] for j in other)


@settings(deadline=None)
@given(two_readings())
def test_no_group_could_be_smaller(readings: tuple[list[bytes], list[bytes]]) -> None:
    found = align(*readings, ended=False)
    expected = slowly(*readings)
    assert found.num_groups == len(expected)
    for group, (own, other) in enumerate(expected):
        assert (found.student[own] == group).all()
        assert (found.teacher[other] == group).all()


@settings(deadline=None)
@given(two_readings())
def test_a_reading_aligned_with_itself_is_one_to_one(readings: tuple[list[bytes], list[bytes]]) -> None:
    found = align(readings[0], readings[0], ended=False)
    assert found.student.tolist() == found.teacher.tolist() == found.partners.tolist() == list(range(len(readings[0])))


def test_end_tokens_are_a_group_of_their_own_and_other_tokens_of_no_bytes_are_masked() -> None:
    found = align([b"a", b"", b"b", b""], [b"", b"ab", b""], ended=True)
    assert found.student.tolist() == [0, -1, 0, 1]
    assert found.teacher.tolist() == [-1, 0, 1]
    assert found.partners.tolist() == [-1, -1, -1, 2]


def test_a_special_token_at_the_end_is_not_an_end_token() -> None:
    found = align([b"a", b""], [b"a", b""], ended=False)
    assert found.student.tolist() == found.teacher.tolist() == [0, -1]


def test_an_end_token_alone_is_aligned() -> None:
    assert align([b""], [b""], ended=True).partners.tolist() == [0]


def test_other_texts_are_refused() -> None:
    with pytest.raises(AlignmentError, match="do not write the same text"):
        align([b"e\xcc\x81"], [b"\xc3\xa9"], ended=False)


# What a token writes.


@pytest.mark.parametrize("make", [lambda: byte_level(300), lambda: byte_level(700), lambda: pieces()])
@pytest.mark.parametrize("text", [text for text in AWKWARD if text and unicodedata.is_normalized("NFC", text)])
def test_the_bytes_of_a_texts_tokens_are_those_of_the_text(make: Any, text: str) -> None:
    tokenizer = make()
    vocabulary = byte_vocabulary(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(vocabulary.written(ids)).removeprefix(b" ") == text.encode().removeprefix(b" ")
    assert len(vocabulary.tokens) == len(tokenizer)


def test_special_tokens_write_nothing_and_other_added_ones_their_text() -> None:
    tokenizer = byte_level(300)
    tokenizer.add_tokens(["<think>"])
    found = token_bytes(tokenizer)
    assert found[tokenizer.eos_token_id] is None
    assert found[tokenizer.convert_tokens_to_ids("<think>")] == b"<think>"
    assert sorted(written for written in found if written and len(written) == 1) == [bytes([n]) for n in range(256)]


def test_a_byte_of_the_fallback_is_a_byte_and_only_there() -> None:
    tokenizer = pieces()
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("<0xE2>")] == b"\xe2"
    core = Tokenizer(models.BPE(vocab={"<0xE2>": 0, "▁a": 1}, merges=[]))
    core.decoder = decoders.Metaspace()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=core)) == [b"<0xE2>", b" a"]


def test_an_id_beyond_the_vocabulary_writes_nothing() -> None:
    assert byte_vocabulary(byte_level(300)).written([10**6]) == [b""]


def test_a_tokenizer_of_no_known_family_is_refused_by_name() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "##a": 1}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match=r"is a WordPiece that decodes by \['WordPiece'\]"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=core))


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    core = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    core.decoder = decoders.ByteLevel()
    with pytest.raises(ConfigError, match="has no end token"):
        byte_vocabulary(PreTrainedTokenizerFast(tokenizer_object=core))


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_space_that_decoding_removes_is_not_of_the_text(scheme: str) -> None:
    core = Tokenizer(models.BPE(vocab={"▁a": 0, "</s>": 1}, merges=[]))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert tokenizer.decode([0, 0]).encode() == b"".join(byte_vocabulary(tokenizer).written([0, 0]))


# Scores.


def groups(student: Sequence[int], teacher: Sequence[int]) -> Alignment:
    sides = (np.array(side, np.int32) for side in (student, teacher))
    return Alignment(student=next(sides), teacher=next(sides), num_groups=max(*student, *teacher) + 1)


def test_every_token_has_the_log_prob_of_its_chunk() -> None:
    sampled, chunks = chunk_scores(groups([0, 1, 1, -1, 2], [0, 0, 1, 2]), np.array([-1.0, -0.5, -2.0, -0.25]))
    assert chunks.tolist() == [0, 1, 1, -1, 2]
    np.testing.assert_array_equal(sampled, np.array([-1.5, -2.0, -2.0, math.nan, -0.25], np.float32))


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_a_chunk_of_too_many_tokens_on_a_side_is_masked(longer: str) -> None:
    for tokens, masked in ((MAX_CHUNK_TOKENS, False), (MAX_CHUNK_TOKENS + 1, True)):
        sides = ([0] * tokens + [1], [0, 1]) if longer == "student" else ([0, 1], [0] * tokens + [1])
        sampled, chunks = chunk_scores(groups(*sides), np.full(len(sides[1]), -1.0))
        assert ((chunks == -1).tolist(), np.isnan(sampled).tolist()) == ([masked] * (len(chunks) - 1) + [False],) * 2


def test_a_score_that_is_missing_makes_its_own_chunk_missing_and_not_masked() -> None:
    sampled, chunks = chunk_scores(groups([0, 1, -1], [0, 0, 1, -1]), np.array([-1.0, math.nan, -2.0, math.nan]))
    assert chunks.tolist() == [0, 1, -1]
    assert np.isnan(sampled).tolist() == [True, False, True]


def test_a_completion_that_is_masked_whole_has_no_score() -> None:
    nothing = Alignment(student=np.array([-1, -1], np.int32), teacher=np.array([-1], np.int32), num_groups=0)
    sampled, chunks = chunk_scores(nothing, np.array([-3.0]))
    assert np.isnan(sampled).all()
    assert chunks.tolist() == [-1, -1]


def test_a_chunk_with_a_hole_in_the_mask_is_left_out_whole() -> None:
    mask = np.array([True, True, False, True, True])
    found = whole_chunks(np.array([0, 1, 1, 2, -1]), mask)
    assert found.tolist() == [True, False, False, True, False]


def test_the_top_k_keeps_the_teachers_mass_in_the_students_ids() -> None:
    translated = np.array([4, -1, 2], np.int32)
    ids, logprobs, tail = map_topk(
        np.array([[0, 1], [2, 0]]), np.log([[0.5, 0.25], [0.7, 0.2]]), np.log([0.25, 0.1]), translated
    )
    assert ids.tolist() == [[4, -1], [2, 4]]
    np.testing.assert_allclose(np.exp(logprobs), [[0.5, math.nan], [0.7, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(tail), [0.5, 0.1], rtol=1e-6)


def test_an_id_that_nobody_knows_and_an_empty_tail_are_no_trouble() -> None:
    ids, _, tail = map_topk(np.array([[7, 0]]), np.log([[0.5, 0.5]]), np.array([-math.inf]), np.array([3], np.int32))
    assert ids.tolist() == [[-1, 3]]
    assert math.exp(tail[0]) == pytest.approx(0.5)


def test_translated_ids_write_the_same_bytes_and_none_occurs_twice() -> None:
    one, other = byte_vocabulary(byte_level(700)), byte_vocabulary(pieces())
    found = translation(teacher=other, student=one)
    there = [(token_id, own) for token_id, own in enumerate(found.tolist()) if own >= 0]
    assert len({own for _, own in there}) == len(there)
    assert found[other.end_id] == one.end_id
    assert all(other.raw(token_id) == one.raw(own) for token_id, own in there)
    assert {written for written in one.tokens if written} & {written for written in other.tokens if written} == {
        other.raw(token_id) for token_id, _ in there if token_id != other.end_id
    }
