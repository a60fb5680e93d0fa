"""Many steps of metrics as few rows that draw the same line. Pure.

M4 (Jugel et al., "M4: A Visualization-Oriented Time Series Data Aggregation", VLDB 2014): the steps are cut into
buckets of equal length, and of each bucket and column the first, last, smallest and largest value stay. Drawn as wide
as there are buckets, the line is the same as of all steps. LTTB, which is better known, picks points by the area of
triangles and may leave a spike out: in the numbers of a run the spike is what one looks for.

Every row is a step as it was measured, with all its columns; nothing is averaged. What was not measured is NaN and
stays so: it is never the smallest, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import ServiceError

Rows = NDArray[np.intp]
Column = NDArray[np.float64]


def columns(steps: Sequence[Mapping[str, float | None]], keys: Sequence[str]) -> dict[str, Column]:
    """Each key over the steps, NaN where a step lacks it.

    >>> columns([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}], ["loss"])["loss"]
    array([ 2., nan])
    """
    return {key: np.array([_number(step.get(key)) for step in steps], dtype=np.float64) for key in keys}


def chosen(measured: Mapping[str, Column], num_steps: int, max_points: int) -> Rows:
    """Which rows stay, in order: all where they fit, else at most `max_points` with every bucket's extremes.

    Raises ServiceError (400) when the extremes of so many columns do not fit even once.

    >>> loss = np.array([5.0, 4.0, 9.0, 3.0, np.nan, 2.0, 1.0, 0.5])
    >>> chosen({"loss": loss}, 8, 4)
    array([0, 2, 7])
    """
    if num_steps <= max_points:
        return np.arange(num_steps)
    buckets = max(1, max_points // 4)  # what fits of one column, whatever its values
    while True:
        kept = _extremes(measured, num_steps, buckets)
        if len(kept) <= max_points:
            return kept
        if buckets == 1:
            message = f"max_points: {len(measured)} keys have their extremes at {len(kept)} steps: ask for fewer keys"
            raise ServiceError(message, 400, "too_few_points")
        buckets //= 2


def _extremes(measured: Mapping[str, Column], num_steps: int, buckets: int) -> Rows:
    edges = np.linspace(0, num_steps, buckets + 1).astype(np.intp)
    starts, lengths = edges[:-1], np.diff(edges)
    found = [starts, edges[1:] - 1]
    for values in measured.values():
        for extreme in (np.fmin, np.fmax):  # both pass over NaN
            in_bucket = np.repeat(extreme.reduceat(values, starts), lengths)
            rows = np.flatnonzero(values == in_bucket)
            _, first = np.unique(np.searchsorted(starts, rows, side="right"), return_index=True)
            found.append(rows[first])
    return np.unique(np.concatenate(found))


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)
