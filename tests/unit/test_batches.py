"""Batches against what every batch must be: each job once, within its budget, contexts in one piece."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.wire import Ask
from teacher_server.batches import by_context, cut, shares, tokens_read
from teacher_server.batching import Job


def job(context: int, *, width: int = 3, length: int = 2) -> Job:
    """A job whose context is `width` times the id `context`."""
    completion = np.arange(length, dtype=np.int32)
    return Job(
        input_ids=np.concatenate([np.full(width, context, np.int32), completion[:-1]]),
        completion_ids=completion,
        token_ids=None,
        ask=Ask(),
        seed=0,
    )


jobs_of_any_shape = st.lists(
    st.builds(job, st.integers(0, 3), width=st.sampled_from([1, 2, 30]), length=st.integers(1, 40)), max_size=25
)


@given(jobs_of_any_shape, st.integers(1, 200))
def test_a_cut_keeps_every_job_once_and_every_batch_within_its_budget(jobs, batch_tokens):
    batches = cut(jobs, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(jobs)))
    for batch in batches:
        assert len(batch) == 1 or tokens_read([jobs[index] for index in batch]) <= batch_tokens


@given(jobs_of_any_shape)
def test_every_token_is_read_alone_or_every_context_once(jobs):
    read = 0
    for group in by_context(jobs):
        members = [jobs[index] for index in group]
        assert len({tuple(one.input_ids[: one.context_length]) for one in members}) == 1
        if shares(members):
            read += members[0].context_length + sum(len(one.completion_ids) - 1 for one in members)
        else:
            read += sum(len(one.input_ids) for one in members)
    assert tokens_read(jobs) == read


def test_jobs_of_one_context_stay_together_though_others_came_between():
    jobs = [job(context, width=20, length=5) for context in (1, 2, 1, 2, 1, 2)]
    assert cut(jobs, 40) == [[0, 2, 4], [1, 3, 5]]


def test_a_context_counts_once_where_that_is_how_it_is_read():
    jobs = [job(1, width=100, length=11) for _ in range(8)]
    assert tokens_read(jobs) == 100 + 8 * 10
    assert cut(jobs, 180) == [list(range(8))]


def test_a_context_too_large_for_one_batch_is_cut_and_counted_in_each():
    jobs = [job(1, width=100, length=11) for _ in range(8)]
    assert [len(batch) for batch in cut(jobs, 140)] == [4, 4]


@pytest.mark.parametrize(("width", "pays"), [(2, False), (100, True)])
def test_a_context_is_shared_only_where_that_saves_work(width, pays):
    assert shares([job(1, width=width, length=50), job(1, width=width, length=50)]) is pays


def test_contexts_of_the_same_ids_but_another_length_are_different():
    assert by_context([job(1, width=100), job(1, width=101)]) == [[0], [1]]
