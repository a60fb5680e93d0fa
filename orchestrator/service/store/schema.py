"""The service's tables. Migrations lead to them (migrations/); a test compares the two.

Times are unix seconds. Lists are ordered and paged by `number`, which only grows. JSON columns hold what is shown and
never searched. Of secrets only salted hashes are kept.
"""

from __future__ import annotations

import sqlalchemy as sa

from orchestrator.service.store.unread import UnreadJSON

META = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

KEYS = sa.Table(
    "keys",
    META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(20), unique=True, nullable=False),
    sa.Column("owner", sa.String(63), nullable=False),  # whose runs it sees; several keys may share one
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("revoked_at", sa.Double),
)
SESSIONS = sa.Table(  # of a browser, in a key's name
    "sessions",
    META,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("key_id", sa.ForeignKey("keys.id"), nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)
RUNS = sa.Table(
    "runs",
    META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(63), unique=True, nullable=False),
    sa.Column("owner", sa.String(63), nullable=False),
    sa.Column("key_id", sa.String(20), nullable=False),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("status_since", sa.Double, nullable=False),
    sa.Column("status_message", sa.Text, nullable=False),
    sa.Column("submitted", UnreadJSON, nullable=False),  # as its client wrote it, by names
    sa.Column("config", UnreadJSON, nullable=False),  # resolved, as its process reads it
    sa.Column("config_sha256", sa.String(64)),  # None of runs that are older than the column
    sa.Column("submission_id", sa.String(100), unique=True, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    # what its owner may change
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("notes", sa.Text, nullable=False),
    # what it told last
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("latest", sa.JSON, nullable=False),
    sa.Column("heartbeat_at", sa.Double),
    sa.Column("code_version", sa.String(40)),  # of the process that reported last
    sa.Column("error", sa.JSON(none_as_null=True)),
    # where it came from
    sa.Column("forked_from", sa.String(63)),
    sa.Column("forked_checkpoint", sa.String(40)),
    # when, and what it used
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("launched_at", sa.Double),  # its present process; None while it has none
    sa.Column("gpus", sa.Double, nullable=False),
    sa.Column("busy_s", sa.Double, nullable=False),  # of processes before the present one
    sa.Column("teacher_tokens", sa.BigInteger, nullable=False),
    sa.Column("teacher_usd", sa.Double, nullable=False),
    sa.Index("ix_runs_owner_number", "owner", "number"),
    # all that is added up over a key's runs, so that their configs are not read for it
    sa.Index("ix_runs_usage", "key_id", "status", "gpus", "busy_s", "launched_at", "teacher_tokens", "teacher_usd"),
)
EVENTS = sa.Table(
    "events",
    META,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("stream", sa.String(10), nullable=False),  # events | metrics: the run's own logs; service: ours
    sa.Column("report_seq", sa.BigInteger),  # its number in the run's own log
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("level", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.UniqueConstraint("run_id", "stream", "report_seq"),
)
CHECKPOINTS = sa.Table(  # what the run's folder does not say of them
    "checkpoints",
    META,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("expires_at", sa.Double),
    sa.Column("published_as", sa.String(200), unique=True),
    sa.Column("deleted_at", sa.Double),
)
FILES = sa.Table(
    "files",
    META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), unique=True, nullable=False),
    sa.Column("owner", sa.String(63), nullable=False),
    sa.Column("key_id", sa.String(20), nullable=False),
    sa.Column("filename", sa.String(255), nullable=False),  # as its owner calls it; never a path here
    sa.Column("purpose", sa.String(20), nullable=False),
    sa.Column("format", sa.String(10), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
    sa.Column("columns", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Index("ix_files_owner_number", "owner", "number"),
)
TEACHERS = sa.Table(
    "teachers",
    META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(63), unique=True, nullable=False),
    sa.Column("key_id", sa.String(20), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("config", sa.JSON, nullable=False),  # a [teacher] table; its secret is a reference
    sa.Column("probe", sa.JSON(none_as_null=True)),
    sa.Column("probed_at", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
)
IDEMPOTENCY = sa.Table(
    "idempotency",
    META,
    sa.Column("key_id", sa.String(20), primary_key=True),
    sa.Column("idempotency_key", sa.String(255), primary_key=True),
    sa.Column("route", sa.String(100), nullable=False),
    sa.Column("body_digest", sa.String(64), nullable=False),
    sa.Column("made", sa.String(63), nullable=False),  # id of what the request made
    sa.Column("created_at", sa.Double, nullable=False, index=True),
)
LEASES = sa.Table(
    "leases",
    META,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("holder", sa.String(80), nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),  # grows with every change of holder: the fence
    sa.Column("expires_at", sa.Double, nullable=False),  # by the database's clock
)
AUDIT = sa.Table(
    "audit",
    META,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("key_id", sa.String(20), nullable=False),
    sa.Column("owner", sa.String(63), nullable=False),
    sa.Column("action", sa.String(40), nullable=False),
    sa.Column("object", sa.String(200), nullable=False),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
)
