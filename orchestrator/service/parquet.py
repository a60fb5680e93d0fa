"""Parquet to JSON Lines, in a process of its own: `python -m orchestrator.service.parquet SOURCE TARGET ROWS BYTES`.

The reader is C++, the bytes are a stranger's, and a few of them may stand for gigabytes: so memory, time and what is
written have limits that the system enforces, and a crash is an answer. Row groups are read one after the other, and of
them the columns that a run reads. It says what is wrong in its own words, never in the reader's, and imports little:
it is waited for.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.errors import ServiceError

READ = ("prompt", "messages", "answer", "solution", "domain", "private")
MOST_WRITTEN_BYTES = 2**30
_SPARE_BYTES, _RATIO = 64 * 2**20, 32  # beyond which a file stands for more than text does that was compressed
MOST_GROUP_BYTES = 2**30  # of a row group, decompressed, as the file itself says
_MOST_MEMORY_BYTES = 4 * 2**30  # of addresses, of which arrow takes many that it never uses
_MOST_S = 120
_BATCH_ROWS = 64
_REFUSED = 3


def to_json_lines(source: Path, target: Path, *, most_rows: int) -> list[str]:
    """Write the new file `target`; returns the names of all columns. Raises ServiceError (400, invalid_file)."""
    most_bytes = min(MOST_WRITTEN_BYTES, _SPARE_BYTES + _RATIO * source.stat().st_size)
    arguments = [str(source), str(target), str(most_rows), str(most_bytes)]
    command = [sys.executable, "-I", "-m", "orchestrator.service.parquet", *arguments]
    environment = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603  ours, with paths of ours
            command, env=environment, capture_output=True, timeout=_MOST_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise _invalid(f"the Parquet file could not be read within {_MOST_S} s") from None
    if done.returncode == _REFUSED:
        raise _invalid(json.loads(done.stdout)["refused"])
    if done.returncode != 0:
        raise _invalid("the file is not Parquet, or takes more memory than a file may")
    return list(json.loads(done.stdout)["columns"])


def main(arguments: Sequence[str]) -> int:
    source, target, most_rows, most_bytes = Path(arguments[0]), Path(arguments[1]), *map(int, arguments[2:])
    limits = {"AS": _MOST_MEMORY_BYTES, "FSIZE": most_bytes, "CPU": _MOST_S, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    try:
        said: dict[str, Any] = {"columns": _convert(source, target, most_rows)}
    except ServiceError as error:
        said = {"refused": str(error)}
    sys.stdout.write(json.dumps(said))
    return _REFUSED if "refused" in said else 0


def _convert(source: Path, target: Path, most_rows: int) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source, memory_map=False) as file, target.open("x") as lines:
            columns = list(file.schema_arrow.names)
            _check(file, pa.types, most_rows)
            read = [name for name in READ if name in columns]
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=read, use_threads=False):
                    for row in batch.to_pylist():
                        given = {name: value for name, value in row.items() if value is not None}
                        lines.write(json.dumps(given, allow_nan=False) + "\n")
    except (pa.ArrowException, MemoryError, ValueError, TypeError):
        raise _invalid("the file is not Parquet that can be read") from None
    except OSError:  # arrow's for a damaged file, the system's for one that has grown too long
        raise _invalid("the file is damaged, or stands for far more text than a file may") from None
    return columns[:1000]


def _check(file: Any, types: Any, most_rows: int) -> None:
    """What the file says of itself, before any of it is decompressed."""
    about = file.metadata
    if about.num_rows > most_rows:
        raise _invalid(f"the file has more than {most_rows} rows")
    for group in range(about.num_row_groups):
        if about.row_group(group).total_byte_size > MOST_GROUP_BYTES:
            raise _invalid(f"a row group has more than {MOST_GROUP_BYTES} bytes: write smaller ones")
    for column in file.schema_arrow:
        if column.name in READ and not _is_json(column.type, types):
            raise _invalid(f"the column `{column.name}` holds values that JSON has no word for")


def _is_json(kind: Any, types: Any) -> bool:
    """Whether values of an arrow type are texts, numbers, truth values, or lists and tables of them."""
    if types.is_dictionary(kind):
        return _is_json(kind.value_type, types)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type, types)
    if types.is_struct(kind):
        return all(_is_json(kind.field(index).type, types) for index in range(kind.num_fields))
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(is_one(kind) for is_one in (*plain, types.is_null))


def _invalid(message: str) -> ServiceError:
    return ServiceError(message, 400, "invalid_file")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
