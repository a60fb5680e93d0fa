"""How old a text is: what a worker says of it is what the buffer counts and what the learner trains on."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.targets import fresh
from potstill.types import ScoredRollout
from rollout_worker.actor import receipt_of
from rollout_worker.collect import Collected, Written
from tests.rollouts import make_rollout, make_scores


@st.composite
def texts(draw: st.DrawFn) -> ScoredRollout:
    """Of any versions, −1 being nobody's, with any tokens left out of the loss or without a score."""
    length = draw(st.integers(1, 6))
    some = st.lists(st.booleans(), min_size=length, max_size=length)
    versions = draw(st.lists(st.integers(-1, 4), min_size=length, max_size=length))
    rollout = make_rollout(completion=range(length), mask=draw(some), versions=versions)
    scores = make_scores(sampled=[-1.0 if scored else math.nan for scored in draw(some)])
    return ScoredRollout(rollout=replace(rollout, snapshot=draw(st.booleans())), scores=scores)


@given(text=texts(), oldest=st.integers(0, 5))
def test_the_tokens_that_a_batch_counts_are_those_that_the_learner_trains(text: ScoredRollout, oldest: int):
    receipt = receipt_of(Collected(scored=(text,), generate_s=1.0, score_s=1.0), 0, None, repetition=math.nan)
    (trained,) = fresh([text], oldest)
    mask = trained.rollout.loss_mask
    assert trained.scores is not None
    unscored = mask & ~np.isfinite(trained.scores.sampled)
    assert receipt.fresh_tokens(oldest) == (mask.sum(), unscored.sum())
    assert trained.rollout.completion_ids.tolist() == text.rollout.completion_ids.tolist()


@pytest.mark.parametrize(
    ("versions", "snapshot", "oldest", "trained"),
    [
        ([3, 3, 4], False, 4, [False, False, True]),
        ([3, 3, 4], False, 3, [True, True, True]),
        ([-1, 3, 4], False, 4, [True, False, True]),  # what nobody's weights wrote has no age
        ([0, 0, 0], True, 4, [True, True, True]),  # nor has what weights wrote that stand still
    ],
)
def test_tokens_of_older_weights_are_read_and_not_trained(
    versions: list[int], snapshot: bool, oldest: int, trained: list[bool]
):
    text = ScoredRollout(rollout=replace(make_rollout(versions=versions), snapshot=snapshot), scores=None)
    assert fresh([text], oldest)[0].rollout.loss_mask.tolist() == trained
    assert text.rollout.loss_mask.all()


def test_what_is_written_is_as_old_as_the_students_oldest_token():
    def written(*versions: list[int], snapshot: bool = False) -> Written:
        rollouts = tuple(replace(make_rollout(versions=some), snapshot=snapshot) for some in versions)
        return Written(rollouts=rollouts, prompts=(), generate_s=0.0)

    assert written([4, 5, 5], [5, 5, 5]).oldest_version == 4
    assert written([-1, 5, 5], [-1, -1, -1]).oldest_version == 5
    for ageless in (written(), written([-1, -1, -1]), written([0, 0, 0], snapshot=True)):
        assert ageless.oldest_version == sys.maxsize


def test_a_text_that_somebody_else_began_is_as_old_as_the_students_part():
    text = ScoredRollout(rollout=make_rollout(versions=[-1, 3, 3]), scores=None)
    receipt = receipt_of(Collected(scored=(text,), generate_s=1.0, score_s=1.0), 0, None, repetition=math.nan)
    assert receipt.oldest_version == 3
