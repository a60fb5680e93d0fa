"""Few rows that draw the same line: extremes survive, nothing is invented, and what is missing stays missing."""

from __future__ import annotations

import csv
import doctest
import io
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.service import downsampling as documented
from orchestrator.service.downsampling import chosen
from orchestrator.service.tables import Table, table_of
from potstill.errors import ServiceError

NUMBERS = st.one_of(st.just(math.nan), st.floats(-1e9, 1e9, allow_nan=False))


def series(length: int, seed: int = 0) -> list[dict[str, float | None]]:
    walk = np.random.default_rng(seed).normal(size=length).cumsum()
    return [{"step": step, "loss": value} for step, value in enumerate(walk.tolist(), 1)]


def made(reported: list[dict[str, float | None]], max_points: int = 1000, **asked: object) -> Table:
    return table_of("one", reported, **{"keys": None, "max_points": max_points, **asked})  # type: ignore[arg-type]


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(documented).failed == 0


@settings(deadline=None, max_examples=200)
@given(st.lists(NUMBERS, min_size=1, max_size=400), st.integers(10, 60))
def test_first_last_smallest_and_largest_of_a_column_survive(values: list[float], max_points: int):
    column = np.array(values)
    kept = chosen({"loss": column}, len(values), max_points)
    assert len(kept) <= max_points
    assert (np.diff(kept) > 0).all()
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    if not np.isnan(column).all():
        assert np.nanmin(column[kept]) == np.nanmin(column)
        assert np.nanmax(column[kept]) == np.nanmax(column)


@settings(deadline=None, max_examples=100)
@given(st.integers(50, 3000), st.integers(10, 200), st.integers(0, 9))
def test_a_line_of_one_pixel_for_each_bucket_covers_the_same_heights(length: int, max_points: int, seed: int):
    column = np.random.default_rng(seed).normal(size=length)
    kept = chosen({"loss": column}, length, max_points)
    if length <= max_points:
        assert kept.tolist() == list(range(length))
        return
    edges = np.linspace(0, length, max_points // 4 + 1).astype(int)
    for start, stop in itertools.pairwise(edges.tolist()):
        inside = kept[(kept >= start) & (kept < stop)]
        assert {start, stop - 1} <= set(inside.tolist())
        assert (column[inside].min(), column[inside].max()) == (column[start:stop].min(), column[start:stop].max())


def test_one_step_that_stands_out_among_100_000_is_there():
    steps = series(100_000)
    steps[54_321]["loss"] = 1e6
    steps[77_777]["loss"] = None
    table = made(steps, 500)
    assert len(table.steps) <= 500
    assert table.resource()["columns"]["loss"][table.steps.index(54_322)] == 1e6


def test_columns_of_many_keys_share_the_points_and_each_keeps_its_extremes():
    rng = np.random.default_rng(1)
    steps = [{"step": n, **{f"key{k}": float(rng.normal()) for k in range(30)}} for n in range(1, 5001)]
    table = made(steps, 300)
    assert 61 <= len(table.steps) <= 300
    for key in table.known:
        every = [step[key] for step in steps]
        assert (min(table.columns[key]), max(table.columns[key])) == (min(every), max(every))
    with pytest.raises(ServiceError, match="30 keys have their extremes at"):
        made(steps, 10)
    assert len(made(steps, 10, keys=["key3", "key4"]).steps) <= 10


def test_what_was_not_measured_is_null_everywhere_and_never_zero():
    steps = [{"step": 1, "loss": 1.5, "eval": None}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.25, "eval": 0.0}]
    table = made(steps, keys=["loss", "eval", "never"])
    shown = table.resource()
    assert shown["columns"] == {
        "step": [1, 2, 3],
        "loss": [1.5, None, 0.25],
        "eval": [None, None, 0.0],
        "never": [None, None, None],
    }
    assert shown["keys"] == ["eval", "loss"]
    json.dumps(shown, allow_nan=False)
    rows = list(csv.reader(io.StringIO(table.csv().decode())))
    assert rows == [
        ["step", "loss", "eval", "never"],
        ["1", "1.5", "", ""],
        ["2", "", "", ""],
        ["3", "0.25", "0.0", ""],
    ]


def test_parquet_reads_back_as_what_was_measured():
    from pyarrow import parquet

    steps = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": None}, {"step": 3, "loss": 1e-30}]
    read = parquet.read_table(io.BytesIO(made(steps).parquet())).to_pydict()
    assert read == {"step": [1, 2, 3], "loss": [0.1, None, 1e-30]}
    assert parquet.read_table(io.BytesIO(made([]).parquet())).to_pydict() == {"step": []}


def test_a_key_that_is_asked_for_twice_and_the_step_itself_make_no_column():
    assert list(made(series(3), keys=["loss", "step", "loss"]).columns) == ["loss"]


def test_sixty_columns_of_200_000_steps_fit_into_5000_rows():
    measured = {f"key{k}": np.random.default_rng(k).normal(size=200_000) for k in range(60)}
    kept = chosen(measured, 200_000, 5000)
    assert len(kept) <= 5000
    assert all(column[kept].max() == column.max() for column in measured.values())
