"""What alembic runs for every command: over the connection that `upgrade` has opened, in its transaction."""

from __future__ import annotations

from alembic import context

from orchestrator.service.store.schema import META

context.configure(
    connection=context.config.attributes["connection"], target_metadata=META, render_as_batch=True, compare_type=True
)
with context.begin_transaction():
    context.run_migrations()
