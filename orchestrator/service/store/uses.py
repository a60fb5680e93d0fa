"""Which files and teachers the configs of unfinished runs name: what is named may not be deleted.

Asked within the transaction that deletes, and that makes a run: of the two, one comes first, and the other is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from orchestrator.service.runs import State
from orchestrator.service.store.schema import FILES, RUNS, TEACHERS
from potstill.errors import ServiceError

REGISTERED = "registered"  # the kind of a teacher that a run names
_FILE_ID = re.compile(r"file-[0-9a-f]{13,40}")


def is_file_id(text: str) -> bool:
    return _FILE_ID.fullmatch(text) is not None


def named_in(submitted: Mapping[str, Any]) -> Iterator[tuple[sa.Table, str]]:
    """What a submitted config names, as (table, id)."""
    data = submitted.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("path"), str) and is_file_id(data["path"]):
        yield FILES, data["path"]
    waiting = [submitted.get("teacher")]
    while waiting:
        table = waiting.pop()
        if isinstance(table, Mapping):
            if table.get("kind") == REGISTERED and isinstance(table.get("name"), str):
                yield TEACHERS, table["name"]
            waiting.extend(table.values())


def require_named(db: sa.Connection, submitted: Mapping[str, Any]) -> None:
    """Raises ServiceError (409) when something that a new run names has just been deleted."""
    for table, name in named_in(submitted):
        if db.execute(sa.select(table.c.id).where(table.c.id == name).with_for_update(read=True)).first() is None:
            raise ServiceError(f"{name} has just been deleted: submit the run with another one", 409, "deleted")


def require_unused(db: sa.Connection, table: sa.Table, name: str) -> None:
    """Raises ServiceError (409) while the config of an unfinished run names the row `name` of `table`."""
    live = [state.value for state in State if not state.final]
    rows = db.execute(sa.select(RUNS.c.submitted).where(RUNS.c.status.in_(live)))
    users = sum((table, name) in set(named_in(row.submitted)) for row in rows)
    if users:
        runs = "1 run names it that is" if users == 1 else f"{users} runs name it that are"
        raise ServiceError(f"{runs} not at an end: wait for it, or cancel it", 409, "in_use")
