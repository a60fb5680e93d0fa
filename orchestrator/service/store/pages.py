"""A page of a list: rows in the order of their numbers, behind a cursor, of what the viewer may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from orchestrator.service.principals import Principal
from potstill.errors import ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a client asks for. `after` is the id of the last item of the page before."""

    limit: int = 20
    after: str | None = None
    ascending: bool = False


def visible(table: sa.Table, viewer: Principal | None) -> sa.ColumnElement[bool]:
    """Which rows of a table with owners a principal may see. None is the service itself. The one place that decides."""
    if viewer is None or viewer.sees_all:
        return sa.true()
    return table.c.owner == viewer.owner


def page_of(
    db: sa.Connection,
    table: sa.Table,
    wanted: Page,
    *where: sa.ColumnElement[bool],
    columns: Sequence[sa.Column[Any]] | None = None,
) -> tuple[list[Any], bool]:
    """Rows, and whether there are more. `columns`: None for all. Raises ServiceError (400, bad_cursor)."""
    number = table.c.number
    query = sa.select(*(columns or table.c)).where(*where).limit(wanted.limit + 1)
    query = query.order_by(number.asc() if wanted.ascending else number.desc())
    if wanted.after is not None:
        cursor = db.execute(sa.select(number).where(table.c.id == wanted.after, *where)).scalar()
        if cursor is None:
            raise ServiceError("`after` names no item of this list", 400, "bad_cursor")
        query = query.where(number > cursor if wanted.ascending else number < cursor)
    rows = db.execute(query).all()
    return list(rows[: wanted.limit]), len(rows) > wanted.limit
