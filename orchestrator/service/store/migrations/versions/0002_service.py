"""Owners, scopes and limits of keys; sessions, files, teachers, checkpoints, leases, the audit log; attempts of runs.

Every table of 0.1 is moved aside, made anew and filled: SQLite cannot change constraints in place. Keys of that time
could do everything, and so they still can; runs of that time belong to their keys' owner, "operator".
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_OLD = ("events", "idempotency", "keys", "runs")
_COPIES = (
    """
    INSERT INTO keys (id, owner, label, scopes, limits, salt, digest, created_at)
    SELECT id, 'operator', label, '["admin"]', '{}', salt, digest, created_at FROM old_keys ORDER BY created_at
    """,
    """
    INSERT INTO runs (id, owner, key_id, status, status_since, status_message,
        submitted, config, submission_id, attempt, revision, priority, metadata, notes, step, latest, error,
        created_at, started_at, finished_at, launched_at, gpus, busy_s, teacher_tokens, teacher_usd)
    SELECT id, 'operator', coalesce((SELECT key_id FROM old_idempotency i WHERE i.run_id = r.id), ''), status,
        coalesce(finished_at, started_at, created_at), '',
        config, config, submission_id, 1, 1, 0, '{}', '', 0, '{}', error,
        created_at, started_at, finished_at, CASE WHEN finished_at IS NULL THEN started_at END, 0, 0, 0, 0
    FROM old_runs r ORDER BY number
    """,
    """
    INSERT INTO events (run_id, seq, stream, report_seq, time, type, level, message, data)
    SELECT run_id, seq, stream, report_seq, time, type, level, message, data FROM old_events
    """,
    """
    INSERT INTO idempotency (key_id, idempotency_key, route, body_digest, made, created_at)
    SELECT key_id, idempotency_key, '/v1/runs', body_digest, run_id, created_at FROM old_idempotency
    """,
)


def upgrade() -> None:
    op.drop_index("ix_runs_status", "runs")
    for table in _OLD:
        op.rename_table(table, f"old_{table}")
    _create()
    for copy in _COPIES:
        op.execute(sa.text(copy))
    for table in _OLD:
        op.drop_table(f"old_{table}")


def _create() -> None:
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("key_id", sa.String(length=20), nullable=False),
        sa.Column("owner", sa.String(length=63), nullable=False),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("object", sa.String(length=200), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit")),
    )
    op.create_table(
        "files",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=63), nullable=False),
        sa.Column("key_id", sa.String(length=20), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(length=20), nullable=False),
        sa.Column("format", sa.String(length=10), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("columns", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_files")),
        sa.UniqueConstraint("id", name=op.f("uq_files_id")),
    )
    op.create_index("ix_files_owner_number", "files", ["owner", "number"], unique=False)
    op.create_table(
        "idempotency",
        sa.Column("key_id", sa.String(length=20), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=False),
        sa.Column("route", sa.String(length=100), nullable=False),
        sa.Column("body_digest", sa.String(length=64), nullable=False),
        sa.Column("made", sa.String(length=63), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "idempotency_key", name=op.f("pk_idempotency")),
    )
    op.create_index(op.f("ix_idempotency_created_at"), "idempotency", ["created_at"], unique=False)
    op.create_table(
        "keys",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=20), nullable=False),
        sa.Column("owner", sa.String(length=63), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_keys")),
        sa.UniqueConstraint("id", name=op.f("uq_keys_id")),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("holder", sa.String(length=80), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    op.create_table(
        "runs",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("owner", sa.String(length=63), nullable=False),
        sa.Column("key_id", sa.String(length=20), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("status_since", sa.Double(), nullable=False),
        sa.Column("status_message", sa.Text(), nullable=False),
        sa.Column("submitted", sa.JSON(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("config_sha256", sa.String(length=64), nullable=True),
        sa.Column("submission_id", sa.String(length=100), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("notes", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("latest", sa.JSON(), nullable=False),
        sa.Column("heartbeat_at", sa.Double(), nullable=True),
        sa.Column("code_version", sa.String(length=40), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("forked_from", sa.String(length=63), nullable=True),
        sa.Column("forked_checkpoint", sa.String(length=40), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("launched_at", sa.Double(), nullable=True),
        sa.Column("gpus", sa.Double(), nullable=False),
        sa.Column("busy_s", sa.Double(), nullable=False),
        sa.Column("teacher_tokens", sa.BigInteger(), nullable=False),
        sa.Column("teacher_usd", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_runs")),
        sa.UniqueConstraint("id", name=op.f("uq_runs_id")),
        sa.UniqueConstraint("submission_id", name=op.f("uq_runs_submission_id")),
    )
    op.create_index("ix_runs_owner_number", "runs", ["owner", "number"], unique=False)
    used = ["key_id", "status", "gpus", "busy_s", "launched_at", "teacher_tokens", "teacher_usd"]
    op.create_index("ix_runs_usage", "runs", used, unique=False)
    op.create_index(op.f("ix_runs_status"), "runs", ["status"], unique=False)
    op.create_table(
        "teachers",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("key_id", sa.String(length=20), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("probe", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("probed_at", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_teachers")),
        sa.UniqueConstraint("id", name=op.f("uq_teachers_id")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("run_id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("published_as", sa.String(length=200), nullable=True),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_checkpoints_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "name", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("published_as", name=op.f("uq_checkpoints_published_as")),
    )
    op.create_table(
        "events",
        sa.Column("run_id", sa.String(length=63), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("stream", sa.String(length=10), nullable=False),
        sa.Column("report_seq", sa.BigInteger(), nullable=True),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_events_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "seq", name=op.f("pk_events")),
        sa.UniqueConstraint("run_id", "stream", "report_seq", name=op.f("uq_events_run_id_stream_report_seq")),
    )
    op.create_table(
        "sessions",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("key_id", sa.String(length=20), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_sessions_key_id_keys")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_sessions")),
    )
