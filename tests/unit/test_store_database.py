"""The database itself: durable, private, migrated from every release, and asked again when it ended a connection."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from orchestrator.reporting import Report
from orchestrator.service.runs import Failure
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.migrations import upgrade
from orchestrator.service.store.pages import Page
from orchestrator.service.store.schema import META
from potstill.errors import ConfigError
from tests.databases import server, url
from tests.postgres import Postgres
from tests.stores import ROOT, create, event, light, told

__all__ = ["light", "server", "url"]  # fixtures


def test_every_connection_is_in_wal_mode_and_syncs_fully(light: Store):
    create(light)
    pragmas = ("journal_mode", "synchronous", "foreign_keys")
    with light.database.engine.connect() as db:
        found = [db.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert found == ["wal", 2, 1]


def test_a_database_that_cannot_do_wal_is_refused():
    with pytest.raises(ConfigError, match="journal_mode"):
        Database("sqlite://")  # in memory: SQLite silently keeps another journal mode


@pytest.mark.parametrize("wrong", ["sqlite:////nowhere/potstill.db", "no url", "nosuch://db"])
def test_a_database_that_cannot_be_opened_is_one_clear_error(wrong: str):
    with pytest.raises(ConfigError, match="--database"):
        Database(wrong)


def test_only_the_owner_can_read_the_files(light: Store, tmp_path: Path):
    create(light)
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


def test_the_file_is_plain_sqlite_that_others_can_read(light: Store, tmp_path: Path):
    create(light)
    with sqlite3.connect(tmp_path / "potstill.db") as db:
        assert db.execute("select id, status from runs").fetchall() == [("one", "queued")]


def test_migrations_lead_to_the_tables_that_the_code_uses(url: str):
    database = Database(url)
    with database.engine.connect() as db:
        assert compare_metadata(MigrationContext.configure(db), META) == []
    database.close()


def test_a_database_of_the_first_release_keeps_its_runs_events_and_keys(url: str):
    """Which were made without a revision, by create_all: the first migration takes such tables as they are."""
    engine = sa.create_engine(url)
    upgrade(engine, "0001")
    old = sa.MetaData()
    old.reflect(engine)
    runs, events_, idempotency = old.tables["runs"], old.tables["events"], old.tables["idempotency"]
    with engine.begin() as db:
        db.exec_driver_sql("DROP TABLE alembic_version")
        for number in (1, 2):
            run = {"id": f"r{number}", "status": "failed", "config": {"n": number}, "submission_id": f"s{number}"}
            error = {"type": "T", "category": "user", "message": "m", "log_tail": None}
            db.execute(runs.insert().values(run | {"created_at": 1.0, "finished_at": 2.0, "error": error}))
        event = {"run_id": "r1", "seq": 1, "stream": "events", "report_seq": 1, "time": 1.0, "type": "t"}
        db.execute(events_.insert().values(event | {"level": "info", "message": "m1", "data": {"a": 1}}))
        kept = {"key_id": "k", "idempotency_key": "i", "body_digest": "b", "run_id": "r2", "created_at": 1.0}
        db.execute(idempotency.insert().values(kept))
    engine.dispose()
    store = Store(Database(url))
    assert [run.id for run in store.runs.page(ROOT, Page(ascending=True))[0]] == ["r1", "r2"]
    assert store.runs.get("r1").error == Failure(type="T", category="user", message="m")
    assert (store.runs.get("r2").key_id, told(store, "r1")) == ("k", ["m1"])
    create(store, "r3")
    assert [run.id for run in store.runs.page(ROOT, Page())[0]] == ["r3", "r2", "r1"]
    store.close()


def test_a_database_of_a_newer_release_is_refused(url: str):
    database = Database(url)
    with database.engine.begin() as db:
        db.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(ConfigError, match="newer potstill"):
        Database(url)


def test_a_server_that_has_ended_the_connections_is_asked_over_new_ones(server: Postgres):
    store = Store(Database(server.database("ended")))
    create(store)
    server.cut("ended")
    assert store.runs.get("one").id == "one"
    server.cut("ended")
    store.runs.report("one", Report.model_validate({"events": [event(1)]}))
    assert told(store) == ["m1"]
    store.close()
