"""Weights arrive whole and as they were sent, or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from potstill.errors import StaleWeights, WeightsError
from potstill.types import TensorEntry, WeightsVersion
from potstill.weights import ALIGNMENT, BUCKET_BYTES, check_fits, check_newer, pack, shapes_in, unpack


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "embed": rng.normal(size=(5, 3)).astype(np.float32),
        "bits": rng.integers(0, 2**16, size=(7,)).astype(np.uint16),
        "scale": np.array(2.5, np.float32),
        "turned": rng.normal(size=(4, 6)).astype(np.float32).T,
    }


def changed(version: WeightsVersion, index: int, **fields: object) -> WeightsVersion:
    """The version with one row of its table rewritten."""
    entries = list(version.tensors)
    entries[index] = dataclasses.replace(entries[index], **fields)
    return dataclasses.replace(version, tensors=tuple(entries))


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([np.float32, np.float16, np.uint16]),
)
def test_what_is_unpacked_is_bit_for_bit_what_was_packed(shapes: list[list[int]], dtype: type) -> None:
    rng = np.random.default_rng(1)
    sent = {f"t{i}": rng.integers(0, 99, size=shape).astype(dtype) for i, shape in enumerate(shapes)}
    version, payload = pack(sent, 3)
    received = unpack(version, payload)
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype
        assert received[name].shape == tensor.shape
        assert received[name].tobytes() == tensor.tobytes()


def test_unpacking_copies_nothing_and_every_view_is_aligned() -> None:
    version, payload = pack(tensors(), 1)
    payload.flags.writeable = False
    for view in unpack(version, payload).values():
        assert np.shares_memory(view, payload)
        assert not view.flags.writeable
    assert all(entry.offset % ALIGNMENT == 0 for entry in version.tensors)


def test_tensors_larger_than_a_bucket_and_gaps_at_its_edge_are_packed_over_whatever_was_in_the_buffer() -> None:
    half = BUCKET_BYTES // 2
    sent = {
        "first": np.arange(half // 4, dtype=np.float32),
        "edge": np.ones(half // 2 - 1, np.uint16),  # its gap ends where the bucket does
        "large": np.arange(2 * BUCKET_BYTES // 4 + 5, dtype=np.float32),
        "nothing": np.zeros((0, 3), np.float32),
    }
    version, payload = pack(sent, 1, room=lambda nbytes: np.full(nbytes, 255, np.uint8))
    assert len(version.checksums) == 4
    received = unpack(version, payload)
    assert all((received[name] == tensor).all() for name, tensor in sent.items())
    assert pack(sent, 1)[0] == version
    payload[BUCKET_BYTES + 7] ^= 1
    with pytest.raises(WeightsError, match="1 of 4 buckets differs, first of bucket 1"):
        unpack(version, payload)


def test_the_table_says_bfloat16_for_the_bits_that_numpy_holds_as_uint16() -> None:
    version, _ = pack(tensors(), 1)
    assert {entry.name: entry.dtype for entry in version.tensors}["bits"] == "bfloat16"
    assert version.payload is None


@pytest.mark.parametrize("position", [0, 100, -1])
def test_one_flipped_bit_is_named_as_a_checksum_that_differs(position: int) -> None:
    version, payload = pack(tensors(), 1)
    payload[position] ^= 1
    with pytest.raises(WeightsError, match="checksum of 1 of 1 buckets"):
        unpack(version, payload)


@pytest.mark.parametrize("fields", [{"name": "other"}, {"dtype": "bfloat16", "shape": (5, 6)}, {"shape": (3, 5)}])
def test_a_table_that_was_changed_is_damage_even_where_the_bytes_are_whole(fields: dict[str, object]) -> None:
    version, payload = pack(tensors(), 1)
    with pytest.raises(WeightsError, match="table is not the one"):
        unpack(changed(version, 0, **fields), payload)


def test_the_bytes_of_one_version_are_not_accepted_as_another() -> None:
    version, payload = pack(tensors(), 1)
    with pytest.raises(WeightsError, match="table is not the one"):
        unpack(dataclasses.replace(version, version=2), payload)


@pytest.mark.parametrize(
    ("index", "fields", "message"),
    [
        (1, {"offset": 0}, "overlaps"),
        (1, {"offset": -64}, "offset -64"),
        (1, {"offset": 65}, "offset 65"),
        (0, {"nbytes": 64}, "do not hold"),
        (0, {"shape": (-5, -3)}, "do not hold"),
        (0, {"dtype": "object"}, "dtype 'object'"),
        (0, {"name": "bits"}, "twice"),
        (3, {"offset": 1 << 20}, "its table says"),
    ],
)
def test_an_entry_that_contradicts_itself_or_the_payload_is_named(
    index: int, fields: dict[str, object], message: str
) -> None:
    version, payload = pack(tensors(), 1)
    with pytest.raises(WeightsError, match=message):
        unpack(changed(version, index, **fields), payload)


@pytest.mark.parametrize("cut", [slice(0, -1), slice(1, None)])
def test_a_payload_of_the_wrong_size_is_refused_with_both_sizes(cut: slice) -> None:
    version, payload = pack(tensors(), 1)
    with pytest.raises(WeightsError, match=str(payload.size)):
        unpack(version, payload[cut])


def test_a_payload_that_is_not_a_row_of_bytes_is_refused() -> None:
    version, payload = pack(tensors(), 1)
    for wrong in (payload.astype(np.int16), payload[None], payload[::2]):
        with pytest.raises(WeightsError, match="contiguous row of bytes"):
            unpack(version, wrong)


def test_nothing_and_unknown_dtypes_cannot_be_packed() -> None:
    with pytest.raises(WeightsError, match="no tensor"):
        pack({}, 1)
    with pytest.raises(WeightsError, match="big: dtype float64"):
        pack({"big": np.zeros(3)}, 1)


@pytest.mark.parametrize("offered", [6, 7])
def test_only_a_later_version_is_newer(offered: int) -> None:
    check_newer(7, 8)
    with pytest.raises(StaleWeights, match=f"version {offered} was offered"):
        check_newer(7, offered)


def test_weights_fit_when_names_shapes_and_dtype_are_the_students() -> None:
    version, _ = pack({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}, 1)
    check_fits(version, {"a": (2, 3), "b": (4,)}, "float32")
    for shapes, dtype, message in (
        ({"a": (2, 3)}, "float32", "unknown tensors: b"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "float32", "missing tensors: c"),
        ({"a": (3, 2), "b": (4,)}, "float32", r"a is float32 \[2, 3\], the student's is float32 \[3, 2\]"),
        ({"a": (2, 3), "b": (4,)}, "bfloat16", "the student's is bfloat16"),
    ):
        with pytest.raises(WeightsError, match=message):
            check_fits(version, shapes, dtype)


def test_weights_that_were_rounded_on_their_way_fit_what_they_were_rounded_from() -> None:
    rounded, _ = pack({"a": np.zeros(3, np.uint16)}, 1, rounded=True)
    check_fits(rounded, {"a": (3,)}, "float32")
    exact, _ = pack({"a": np.zeros(3, np.uint16)}, 1)
    with pytest.raises(WeightsError, match="a is bfloat16"):
        check_fits(exact, {"a": (3,)}, "float32")


def test_shapes_come_from_every_file_of_a_folder_without_a_tied_head(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"lm_head.weight": np.zeros((4, 1), np.float32)}, tmp_path / "model-2.safetensors")
    for tied, expected in ((False, {"a": (2, 3), "lm_head.weight": (4, 1)}), (True, {"a": (2, 3)})):
        (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        assert shapes_in(tmp_path) == expected


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no model weights"):
        shapes_in(tmp_path)


def test_an_empty_table_is_refused() -> None:
    empty: tuple[TensorEntry, ...] = ()
    with pytest.raises(WeightsError, match="empty"):
        unpack(WeightsVersion(version=1, digest="", checksums=(), tensors=empty, payload=None), np.zeros(0, np.uint8))
