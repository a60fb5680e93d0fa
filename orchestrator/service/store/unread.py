"""JSON that is parsed when somebody looks inside: lists of runs and the supervisor hardly look into configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import sqlalchemy as sa


class Unread(Mapping[str, Any]):
    """A JSON object as the database has it."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _read(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._text)
        return value

    def __getitem__(self, key: str) -> Any:
        return self._read[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def __repr__(self) -> str:
        return f"Unread({self._text})"


class UnreadJSON(sa.TypeDecorator[Mapping[str, Any]]):
    """A JSON column that is read as Unread. PostgreSQL's driver would parse it, so it is asked for the text."""

    impl = sa.JSON
    cache_ok = True

    def column_expression(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.type_coerce(sa.cast(column, sa.Text), self)

    def process_bind_param(self, value: Mapping[str, Any] | None, dialect: sa.Dialect) -> dict[str, Any] | None:
        return None if value is None else dict(value)

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Callable[[Any], Unread | None]:
        return lambda text: None if text is None else Unread(text)
