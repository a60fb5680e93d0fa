"""The tables of potstill 0.1: databases of that time carry no revision, so that they may be there already."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_META = sa.MetaData()
sa.Table(
    "runs",
    _META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(63), unique=True, nullable=False),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("submission_id", sa.String(100), unique=True, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("token_salt", sa.LargeBinary),
    sa.Column("token_digest", sa.LargeBinary),
)
sa.Table(
    "events",
    _META,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("stream", sa.String(10), nullable=False),
    sa.Column("report_seq", sa.BigInteger),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("level", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.UniqueConstraint("run_id", "stream", "report_seq"),
)
sa.Table(
    "keys",
    _META,
    sa.Column("id", sa.String(20), primary_key=True),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)
sa.Table(
    "idempotency",
    _META,
    sa.Column("key_id", sa.String(20), primary_key=True),
    sa.Column("idempotency_key", sa.String(255), primary_key=True),
    sa.Column("body_digest", sa.String(64), nullable=False),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)


def upgrade() -> None:
    _META.create_all(op.get_bind(), checkfirst=True)
