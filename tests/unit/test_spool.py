"""What was paid for comes back bit for bit, or is reported as missing: never in part, never twice."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from potstill import spool
from potstill.durable import sweep
from potstill.errors import ChunkLost, Fenced, RunError
from potstill.fencing import Fence, next_attempt
from potstill.types import Bundle, Receipt, Rollout, ScoredRollout, TeacherScores
from tests.disks import files_of_at_most
from tests.receipts import make_receipt
from tests.rollouts import make_scored, random_batch


def of_hint(hint: Any, length: int) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may have in a rollout of `length` tokens."""
    kinds = [kind for kind in get_args(hint) or [hint] if get_origin(kind) is np.ndarray]
    if get_origin(hint) is np.ndarray:
        dtype = get_args(get_args(hint)[1])[0]  # NDArray[X] is ndarray[shape, dtype[X]]
        return arrays.arrays(dtype, st.sampled_from([(length,), (length, 0), (length, 2), (length, 3)]))
    return st.none() | of_hint(kinds[0], length) if kinds else st.from_type(hint)


@st.composite
def some(draw: st.DrawFn, kind: type[Any], length: int) -> Any:
    """A record with every field that its class has, whatever fields it has."""
    hints = get_type_hints(kind)
    return kind(**{field.name: draw(of_hint(hints[field.name], length)) for field in dataclasses.fields(kind)})


@st.composite
def chunks(draw: st.DrawFn) -> list[ScoredRollout]:
    lengths = draw(st.lists(st.integers(1, 4), max_size=4))
    return [
        ScoredRollout(rollout=draw(some(Rollout, n)), scores=draw(st.none() | some(TeacherScores, n))) for n in lengths
    ]


def assert_same(one: Any, other: Any) -> None:
    """Equal in every field, down to the type and the bits."""
    assert type(one) is type(other)
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    else:
        assert one == other or (math.isnan(one) and math.isnan(other))


def slips(scored: Sequence[ScoredRollout], first: int = 0) -> dict[int, list[Receipt]]:
    """One prompt, whose completions they all are."""
    return {first: [dataclasses.replace(make_receipt(first), position=position) for position in range(len(scored))]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "rollouts"


@pytest.fixture
def fence(tmp_path: Path) -> Fence:
    return Fence(tmp_path, next_attempt(tmp_path))


@pytest.fixture
def chunk(folder: Path, fence: Fence) -> Path:
    """Prompts 8 and 9, of two rollouts and one."""
    scored = random_batch([(3, 4), (1, 3), (2, 5)], vocabulary=11, seed=0)
    groups = {8: [make_receipt(8, sample=0), make_receipt(8, sample=1)], 9: [make_receipt(9, sample=2)]}
    return spool.write(folder, scored, groups, fence)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scored=chunks())
def test_every_field_of_every_rollout_comes_back_bit_for_bit(scored: list[ScoredRollout], tmp_path: Path) -> None:
    path = spool.write(tmp_path, scored, slips(scored), Fence(tmp_path, 1))
    try:
        found = spool.read(path)
    finally:
        path.unlink()
    assert len(found) == len(scored)
    for one, other in zip(scored, found, strict=True):
        assert_same(one, other)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_field_of_a_receipt_comes_back_but_where_its_rollouts_lie(data: st.DataObject, tmp_path: Path) -> None:
    hints = {name: hint for name, hint in get_type_hints(Receipt).items() if name != "bundle"}
    receipt = Receipt(**{name: data.draw(of_hint(hint, 1)) for name, hint in hints.items()}, bundle=object())
    path = spool.write(tmp_path, [], {5: [receipt]}, Fence(tmp_path, 1))
    try:
        found = spool.receipts(path)
    finally:
        path.unlink()
    assert_same(found[5][0], dataclasses.replace(receipt, bundle=Bundle(ref=None, path=str(path))))


def test_a_chunk_may_mix_what_one_source_measures_and_another_does_not(folder: Path, fence: Fence) -> None:
    full = random_batch([(3, 4)], vocabulary=11, seed=0)[0]
    bare = ScoredRollout(rollout=dataclasses.replace(make_scored().rollout, support_ids=None), scores=None)
    found = spool.read(spool.write(folder, [bare, full, bare], slips([bare, full, bare]), fence))
    for one, other in zip([bare, full, bare], found, strict=True):
        assert_same(one, other)


def test_a_file_is_named_after_its_first_and_last_prompt_and_lists_in_their_order(folder: Path, fence: Fence) -> None:
    for prompts in (range(10, 12), range(2_000_000_000, 2_000_000_001), range(2)):
        spool.write(folder, [], {prompt: [make_receipt(prompt)] for prompt in prompts}, fence)
    assert "000000010-000000011.safetensors" in {path.name for path in folder.iterdir()}
    assert list(spool.listing(folder).chunks) == [range(2), range(10, 12), range(2_000_000_000, 2_000_000_001)]


def test_the_listing_is_enough_to_find_every_rollout_again(chunk: Path) -> None:
    held = spool.listing(chunk.parent)
    groups = held.chunks[range(8, 10)]
    assert not held.lost
    assert [receipt.rollout_id for group in groups.values() for receipt in group] == [
        "train-8/0",
        "train-8/1",
        "train-9/2",
    ]
    bundle = pickle.loads(pickle.dumps(groups[9][0].bundle))  # noqa: S301
    assert len(spool.read(Path(bundle.path))[groups[9][0].position].rollout.completion_ids) == 5


def test_prompts_without_a_rollout_are_part_of_a_chunk(folder: Path, fence: Fence) -> None:
    spool.write(folder, [], {3: [], 4: []}, fence)
    assert spool.listing(folder).chunks == {range(3, 5): {3: [], 4: []}}


def test_a_chunk_with_a_hole_is_refused(folder: Path, fence: Fence) -> None:
    with pytest.raises(ValueError, match=r"not \[3, 5\]"):
        spool.write(folder, [], {5: [], 3: []}, fence)


def test_an_empty_spool_and_none_hold_nothing(folder: Path) -> None:
    assert spool.listing(folder) == spool.Listing(chunks={}, lost={})
    folder.mkdir()
    assert spool.listing(folder) == spool.Listing(chunks={}, lost={})


def test_a_retried_call_keeps_what_the_first_one_wrote(chunk: Path, fence: Fence) -> None:
    before = chunk.read_bytes()
    assert spool.write(chunk.parent, [make_scored()], {8: [make_receipt(8, tokens=77)], 9: []}, fence) == chunk
    assert chunk.read_bytes() == before


def test_a_damaged_chunk_is_written_again(chunk: Path, fence: Fence) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-1])
    spool.write(chunk.parent, [make_scored()], {8: [make_receipt(8)], 9: []}, fence)
    assert len(spool.read(chunk)) == 1


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 0.5, -1])
def test_a_file_cut_anywhere_is_missing_and_named(chunk: Path, kept: float) -> None:
    content = chunk.read_bytes()
    chunk.write_bytes(content[: int(len(content) * kept) if 0 < kept < 1 else int(kept)])
    held = spool.listing(chunk.parent)
    assert not held.chunks
    assert "cut short" in held.lost[chunk]
    with pytest.raises(ChunkLost, match=chunk.name):
        spool.read(chunk)


def test_one_flipped_bit_anywhere_is_missing_and_named(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    for place in range(0, len(content), 37):
        content[place] ^= 1 << place % 8
        chunk.write_bytes(content)
        held = spool.listing(chunk.parent, thorough=True)
        assert (list(held.chunks), list(held.lost)) == ([], [chunk]), f"byte {place} of {len(content)}"
        with pytest.raises(ChunkLost):
            spool.read(chunk)
        content[place] ^= 1 << place % 8
    chunk.write_bytes(content)
    assert not spool.listing(chunk.parent, thorough=True).lost


def test_a_chunk_under_another_ones_name_is_missing(chunk: Path) -> None:
    moved = chunk.rename(spool.path_of(chunk.parent, range(10, 12)))
    assert "name" in spool.listing(chunk.parent).lost[moved]


def test_a_file_that_is_not_there_is_lost(folder: Path) -> None:
    with pytest.raises(ChunkLost, match="missing"):
        spool.read(folder / "000000000-000000001.safetensors")


def test_the_header_alone_is_read_for_receipts(folder: Path, fence: Fence) -> None:
    """Damage to the arrays is nothing to those who read none."""
    path = spool.write(folder, [make_scored()], slips([make_scored()]), fence)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert list(spool.receipts(path)) == [0]
    assert spool.listing(folder, thorough=True).lost


def test_only_chunks_whose_prompts_are_all_trained_are_removed(folder: Path, fence: Fence) -> None:
    for prompts in (range(4), range(4, 8), range(8, 12)):
        spool.write(folder, [], {prompt: [] for prompt in prompts}, fence)
    (folder / "notes.safetensors").touch()
    gone = spool.prune(folder, trained=range(6).__contains__)
    assert gone == [spool.path_of(folder, range(4))]
    assert list(spool.listing(folder).chunks) == [range(4, 8), range(8, 12)]
    assert {path.name for path in folder.iterdir()} > {"notes.safetensors"}


def test_an_attempt_that_is_over_writes_nothing(folder: Path, fence: Fence, tmp_path: Path) -> None:
    next_attempt(tmp_path)
    with pytest.raises(Fenced, match="attempt 2 has begun"):
        spool.write(folder, [], {0: []}, fence)
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_one_error_and_leaves_nothing_behind(chunk: Path, fence: Fence) -> None:
    with files_of_at_most(1000), pytest.raises(RunError, match=r"rollouts: disk is full: free space and resume"):
        spool.write(chunk.parent, random_batch([(9, 90)], vocabulary=11, seed=1), {0: [make_receipt(0)]}, fence)
    assert list(chunk.parent.iterdir()) == [chunk]
    assert not spool.listing(chunk.parent, thorough=True).lost


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path, fence: Fence) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        spool.write(tmp_path / "file", [], {0: []}, fence)


WRITER = """
import sys
from pathlib import Path
from potstill import spool
from potstill.fencing import Fence
from tests.receipts import make_receipt
from tests.rollouts import random_batch

folder = Path(sys.argv[1])
scored = random_batch([(50, 4000)] * 8, vocabulary=64, seed=0)
print("ready", flush=True)
for prompt in range(10_000):
    spool.write(folder, scored, {prompt: [make_receipt(prompt, sample=n) for n in range(8)]}, Fence(folder, 1))
"""


def test_a_writer_killed_at_any_moment_leaves_whole_chunks_alone(folder: Path) -> None:
    random = np.random.default_rng(0)
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(timeout=random.uniform(0.01, 0.12))
            writer.kill()
    held = spool.listing(folder, thorough=True)
    assert not held.lost
    sweep(folder)
    assert len(list(folder.iterdir())) == len(held.chunks)
