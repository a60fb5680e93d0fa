"""A sum of a row of bytes is the same on every device, and another one once a word has changed or moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from potstill.transports.rows import BLOCK, GOLDEN, padded, row, sums, tensor
from potstill.weights import laid_out

WORD = 1 << 64


def words(count: int) -> torch.Tensor:
    """uint8 [8 · count] of random words."""
    drawn = np.random.default_rng(0).integers(0, 256, 8 * count, dtype=np.uint8)
    return torch.from_numpy(drawn)


def factor(place: int) -> int:
    return (place * GOLDEN % WORD) | 1


def by_hand(content: torch.Tensor) -> int:
    """The definition, in whole numbers."""
    found = content.numpy().view(np.uint64).tolist()
    blocks = [found[start : start + BLOCK] for start in range(0, len(found), BLOCK)]
    inner = [sum(factor(place) * word for place, word in enumerate(block)) for block in blocks]
    return sum(factor(place) * part for place, part in enumerate(inner)) % WORD


@pytest.mark.parametrize("count", [1, 7, BLOCK, BLOCK + 3])
def test_a_sum_is_what_its_definition_says_modulo_two_to_the_sixty_fourth(count: int) -> None:
    content = words(count)
    assert sums([content]) == [by_hand(content)]


def test_one_changed_bit_shows_wherever_it_is() -> None:
    content = words(500)
    (before,) = sums([content])
    for place in range(0, content.numel(), 37):
        for bit in (1, 128):
            content[place] ^= bit
            assert sums([content]) != [before]
            content[place] ^= bit
    assert sums([content]) == [before]


def test_words_that_changed_places_show() -> None:
    content = words(BLOCK + 10)
    (before,) = sums([content])
    for one, other in ((0, 1), (2, 400), (5, BLOCK + 5)):
        moved = content.view(torch.int64).clone()
        moved[[one, other]] = moved[[other, one]]
        assert sums([moved.view(torch.uint8)]) != [before]


def test_a_tensor_lies_in_its_row_with_zeros_after_it_wherever_the_room_begins() -> None:
    table = laid_out([("a", "float32", (3,)), ("b", "bfloat16", (5, 7)), ("c", "float32", ())])
    room = torch.zeros(table[-1].offset + padded(table[-1].nbytes), dtype=torch.uint8)
    for entry in table:
        tensor(room, entry).copy_(torch.randn(entry.shape))
    start = table[1].offset
    piece = room[start:].clone()
    for entry in table[1:]:
        assert torch.equal(tensor(piece, entry, start), tensor(room, entry))
        assert tensor(piece, entry, start).shape == entry.shape
        assert sums([row(piece, entry, start)]) == sums([row(room, entry)])
        assert not row(room, entry)[entry.nbytes :].any()
    assert sums([]) == []
