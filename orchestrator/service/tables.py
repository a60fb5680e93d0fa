"""Columns of metrics as JSON, CSV or Parquet. What was not measured is null, an empty cell or null."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.service.downsampling import Column, Rows, chosen, columns

MEDIA = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Some steps of a run, and the columns that were asked for."""

    run: str
    num_steps: int  # of which these are some
    known: Sequence[str]  # every key that one of those has measured
    steps: Sequence[int]
    columns: Mapping[str, Column]

    def resource(self) -> dict[str, Any]:
        """As the API shows it."""
        measured = {key: [_nullable(value) for value in column.tolist()] for key, column in self.columns.items()}
        return {
            "object": "metrics",
            "run": self.run,
            "steps": self.num_steps,
            "points": len(self.steps),
            "keys": list(self.known),
            "columns": {"step": list(self.steps), **measured},
        }

    def csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", *self.columns])
        for row in zip(self.steps, *(column.tolist() for column in self.columns.values()), strict=True):
            writer.writerow("" if isinstance(value, float) and math.isnan(value) else repr(value) for value in row)
        return text.getvalue().encode()

    def parquet(self) -> bytes:
        import pyarrow as pa
        from pyarrow import parquet

        arrays = [pa.array(column, type=pa.float64(), from_pandas=True) for column in self.columns.values()]
        arrays.insert(0, pa.array(self.steps, type=pa.int64()))
        buffer = io.BytesIO()
        parquet.write_table(pa.Table.from_arrays(arrays, names=["step", *self.columns]), buffer)
        return buffer.getvalue()


def table_of(
    run: str,
    reported: Sequence[Mapping[str, float | None]],
    *,
    keys: Sequence[str] | None,
    max_points: int,
) -> Table:
    """What a run reported of some steps. `keys` None: all. A key that no step has is all null.

    Raises ServiceError (400) where so many keys do not fit into so few points.
    """
    known = sorted({key for step in reported for key in step} - {"step"})
    measured = columns(reported, known if keys is None else [key for key in dict.fromkeys(keys) if key != "step"])
    kept: Rows = chosen(measured, len(reported), max_points)
    return Table(
        run=run,
        num_steps=len(reported),
        known=known,
        steps=[_step(reported[row]) for row in kept],
        columns={key: column[kept] for key, column in measured.items()},
    )


def _step(record: Mapping[str, float | None]) -> int:
    step = record["step"]
    assert step is not None, "ReportedMetrics has it as a number"
    return int(step)


def _nullable(value: float) -> float | None:
    return value if math.isfinite(value) else None
