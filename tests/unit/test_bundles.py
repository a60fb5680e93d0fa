"""From a receipt back to its rollout, where only the run's spool still has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from potstill import bundles, spool
from potstill.errors import ChunkLost
from potstill.fencing import Fence
from potstill.types import Bundle, Receipt, ScoredRollout
from tests.receipts import make_receipt
from tests.rollouts import make_rollout


def spooled(folder: Path, chunk: range) -> list[Receipt]:
    """Receipts of a chunk that lies on disk, one to a prompt; each rollout has its prompt's number for its tokens."""
    bundle = Bundle(ref=None, path=str(spool.path_of(folder, chunk)))
    receipts = [replace(make_receipt(prompt), bundle=bundle, position=n) for n, prompt in enumerate(chunk)]
    scored = [ScoredRollout(rollout=make_rollout(completion=(prompt, prompt)), scores=None) for prompt in chunk]
    spool.write(folder, scored, {prompt: [receipt] for prompt, receipt in zip(chunk, receipts, strict=True)}, FENCE)
    return receipts


FENCE = Fence(Path("nowhere"), 1)


def tokens(receipts: Sequence[Receipt]) -> list[int]:
    return [scored.rollout.completion_ids.tolist()[0] for scored in bundles.rollouts(receipts)]


def test_each_receipt_finds_its_own_rollout_in_whatever_order(tmp_path: Path):
    first, second = spooled(tmp_path, range(3)), spooled(tmp_path, range(3, 5))
    assert tokens([second[1], first[2], first[0], second[0], first[2]]) == [4, 2, 0, 3, 2]
    assert tokens([]) == []


def test_receipts_that_the_spool_gave_back_find_their_rollouts(tmp_path: Path):
    spooled(tmp_path, range(3, 5))
    (groups,) = spool.listing(tmp_path).chunks.values()
    assert tokens([receipt for group in groups.values() for receipt in group]) == [3, 4]


def test_a_chunk_that_is_nowhere_any_more_says_so(tmp_path: Path):
    receipts = spooled(tmp_path, range(2))
    spool.path_of(tmp_path, range(2)).unlink()
    with pytest.raises(ChunkLost, match="missing"):
        bundles.rollouts(receipts)
    with pytest.raises(ChunkLost, match="lost with the worker that held them"):
        bundles.rollouts([replace(receipts[0], bundle=Bundle(ref=None, path=None))])


def test_a_damaged_chunk_is_not_trained_on(tmp_path: Path):
    receipts = spooled(tmp_path, range(2))
    path = spool.path_of(tmp_path, range(2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ChunkLost, match="damaged"):
        bundles.rollouts(receipts)
