"""A privileged context fades sentence by sentence, and at the end nothing of it is left."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.fading import faded, share

SOLUTION = 'Add 2.5 and 9. Carry "1."\nIs 1+0+1=2? Yes!\n\nAnswer: 21'
SENTENCES = ["Add 2.5 and 9.", ' Carry "1."', "\nIs 1+0+1=2?", " Yes!", "\n\nAnswer: 21"]


@pytest.mark.parametrize("kept", range(6))
def test_whole_sentences_are_kept_in_order(kept: int) -> None:
    assert faded(SOLUTION, share=kept / 5) == "".join(SENTENCES[:kept])


@given(context=st.text(alphabet="ab .!?\n\"'", max_size=60), step=st.integers(11, 99))
def test_nothing_survives_once_the_share_is_zero(context: str, step: int) -> None:
    assert faded(context, share=share(step, decay_steps=10)) == ""


@given(context=st.text(alphabet="ab .!?\n\"'", max_size=60))
def test_at_first_all_of_it_is_there(context: str) -> None:
    assert faded(context, share=share(1, decay_steps=10)).split() == context.split()


@given(context=st.text(alphabet="ab .!?\n", max_size=60))
def test_what_is_kept_only_shrinks_and_is_always_a_beginning(context: str) -> None:
    left = [faded(context, share=share(step, decay_steps=10)) for step in range(1, 12)]
    for longer, shorter in pairwise(left):
        assert longer.startswith(shorter)


def test_the_share_falls_in_a_line_to_zero_and_stays() -> None:
    assert [share(step, decay_steps=4) for step in (1, 2, 3, 4, 5, 6, 100)] == [1, 0.75, 0.5, 0.25, 0, 0, 0]
