"""The database: durable settings, one row per name, events without gaps or doubles, secrets as hashes only."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.reporting import Report
from orchestrator.service.runs import Failure, SequenceGap, State
from orchestrator.service.store import Store
from potstill.errors import ConfigError, ServiceError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 'potstill.db'}")
    yield opened
    opened.close()


def create(store: Store, name: str = "one", *, key: str | None = None, body: str = "b"):
    return store.create_run(name, {"name": name}, key_id="k", idempotency_key=key, body_digest=body)


def events(*numbers: int, statuses: list | None = None) -> Report:
    rows = [{"seq": n, "time": 1.0, "type": "t", "level": "info", "message": f"m{n}", "data": {}} for n in numbers]
    return Report.model_validate({"events": rows, "statuses": statuses or []})


def told(store: Store, name: str = "one") -> list[str]:
    """Messages of the run's own events, as the database holds them."""
    return [event.message for event in store.list_events(name, after=0, limit=10_000) if event.type == "t"]


def test_every_connection_is_in_wal_mode_and_syncs_fully(store: Store, tmp_path: Path):
    create(store)
    pragmas = ("journal_mode", "synchronous", "foreign_keys")
    with store._engine.connect() as db:
        found = [db.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert found == ["wal", 2, 1]


def test_a_database_that_cannot_do_wal_is_refused():
    with pytest.raises(ConfigError, match="journal_mode"):
        Store("sqlite://")  # in memory: SQLite silently keeps another journal mode


@pytest.mark.parametrize("url", ["sqlite:////nowhere/potstill.db", "no url", "nosuch://db"])
def test_a_database_that_cannot_be_opened_is_one_clear_error(url: str):
    with pytest.raises(ConfigError, match="--database"):
        Store(url)


def test_only_the_owner_can_read_the_files(store: Store, tmp_path: Path):
    create(store)
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


def test_a_run_survives_the_store(store: Store, tmp_path: Path):
    made, replayed = create(store)
    again = Store(f"sqlite:///{tmp_path / 'potstill.db'}")
    assert (again.get_run("one"), replayed) == (made, False)
    assert made.submission_id.startswith("potstill-one-")
    again.close()


def test_a_name_is_taken_once(store: Store):
    create(store)
    with pytest.raises(ServiceError, match="one exists") as caught:
        create(store)
    assert (caught.value.status, caught.value.code) == (409, "name_taken")


def test_the_same_request_twice_makes_one_run_and_another_body_is_refused(store: Store):
    first, _ = create(store, key="i")
    assert create(store, key="i") == (first, True)
    with pytest.raises(ServiceError) as caught:
        create(store, name="two", key="i", body="other")
    assert caught.value.status == 422
    assert not store.has_run("two")


def test_pages_follow_creation_in_both_directions(store: Store):
    for number in range(5):
        create(store, f"r{number}")
    page, more = store.list_runs(limit=2, after=None, ascending=False)
    assert ([run.id for run in page], more) == (["r4", "r3"], True)
    page, more = store.list_runs(limit=3, after="r3", ascending=False)
    assert ([run.id for run in page], more) == (["r2", "r1", "r0"], False)
    page, _ = store.list_runs(limit=2, after="r1", ascending=True)
    assert [run.id for run in page] == ["r2", "r3"]
    with pytest.raises(ServiceError, match="after"):
        store.list_runs(limit=2, after="nobody", ascending=True)


def test_a_move_is_an_event_and_a_final_state_stays(store: Store):
    create(store)
    failure = Failure(type="WorkerLost", category="system", message="gone", log_tail="last words")
    run = store.move("one", State.FAILED, "it died", failure)
    assert (run.state, run.error) == (State.FAILED, failure)
    assert run.finished_at is not None
    with pytest.raises(ServiceError) as caught:
        store.move("one", State.RUNNING, "no")
    assert caught.value.code == "illegal_transition"
    assert [event.data["status"] for event in store.list_events("one", after=0, limit=9)] == ["queued", "failed"]


def test_a_replayed_record_is_accepted_and_not_doubled(store: Store):
    create(store)
    assert store.append("one", events(1, 2))["events"] == 2
    assert store.append("one", events(1, 2, 3))["events"] == 3
    assert told(store) == ["m1", "m2", "m3"]


def test_a_gap_is_refused_with_the_number_that_is_wanted_and_nothing_is_kept(store: Store):
    create(store)
    store.append("one", events(1))
    with pytest.raises(SequenceGap) as caught:
        store.append("one", events(2, 4, statuses=[{"status": "running", "time": 1.0}]))
    assert (caught.value.stream, caught.value.wanted, caught.value.status) == ("events", 3, 409)
    assert told(store) == ["m1"]
    assert store.get_run("one").state is State.QUEUED


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.lists(st.integers(1, 6), max_size=6), max_size=8))
def test_whatever_is_sent_the_run_holds_a_prefix_of_its_log(batches: list[list[int]]):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/potstill.db")
        create(store)
        held = 0
        for batch in batches:
            reached = held
            refused = False
            for number in batch:
                refused = refused or number > reached + 1
                reached = max(reached, number)
            if refused:
                with pytest.raises(SequenceGap):
                    store.append("one", events(*batch))
            else:
                assert store.append("one", events(*batch)) == {"events": reached, "metrics": 0}
                held = reached
            assert told(store) == [f"m{number}" for number in range(1, held + 1)]
        seqs = [event.seq for event in store.list_events("one", after=0, limit=100)]
        assert seqs == list(range(1, held + 2))  # and one for the state it began in
        store.close()


def test_writers_at_the_same_time_number_events_without_gaps(store: Store):
    for name in ("one", "two"):
        create(store, name)
    errors: list[Exception] = []

    def write(name: str) -> None:
        try:
            for number in range(1, 21):
                store.append(name, events(number))
        except ServiceError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Two senders of one log may overtake each other; what is refused then is a gap, never a double or a lost number.
    assert all(isinstance(error, SequenceGap) for error in errors)
    assert told(store, "one") == [f"m{number}" for number in range(1, 21)]
    assert told(store, "two") == [f"m{number}" for number in range(1, 21)]


def test_a_reported_status_moves_the_run_and_a_late_one_changes_nothing(store: Store):
    create(store)
    error = {"type": "NonFinite", "category": "system", "message": "loss is NaN"}
    store.append("one", events(statuses=[{"status": "running", "time": 2.0, "pid": 1}]))
    store.append("one", events(1, statuses=[{"status": "failed", "time": 3.0, "pid": 1, "error": error}]))
    store.append("one", events(2, statuses=[{"status": "succeeded", "time": 4.0, "pid": 1}]))
    run = store.get_run("one")
    assert (run.state, run.started_at, run.finished_at) == (State.FAILED, 2.0, 3.0)
    assert run.error == Failure(type="NonFinite", category="system", message="loss is NaN")
    assert told(store) == ["m1", "m2"]


def test_metrics_become_events_and_a_missing_number_stays_missing(store: Store):
    create(store)
    record = {"seq": 1, "time": 5.0, "step": 3, "loss": 0.25, "accuracy": None}
    assert store.append("one", Report.model_validate({"metrics": [record]})) == {"events": 0, "metrics": 1}
    event = store.list_events("one", after=1, limit=9)[0]
    assert (event.type, event.data) == ("metrics", {"step": 3, "loss": 0.25, "accuracy": None})


def test_a_key_opens_and_is_nowhere_on_disk(store: Store, tmp_path: Path):
    create(store)
    assert not store.has_keys()
    key, token = store.create_key("mine"), store.mint_token("one")
    assert store.has_keys()
    assert store.key_id_of(key) == key.split("_")[1]
    assert store.token_matches("one", token)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.split("_", 2)[2].encode() not in written
    assert token.encode() not in written


@pytest.mark.parametrize("wrong", ["", "ps", "ps__", "ps_nobody_secret", "Bearer", "ps_\ud800_x"])
def test_no_other_text_is_a_key(store: Store, wrong: str):
    key = store.create_key("mine")
    create(store)
    store.mint_token("one")
    assert store.key_id_of(wrong) is None
    assert store.key_id_of(key[:-1]) is None
    assert not store.token_matches("one", wrong)
    assert not store.token_matches("nobody", wrong)


def test_a_new_token_ends_the_old_one(store: Store):
    create(store)
    assert not store.token_matches("one", "none yet")
    old, new = store.mint_token("one"), store.mint_token("one")
    assert (store.token_matches("one", old), store.token_matches("one", new)) == (False, True)


def test_the_file_is_plain_sqlite_that_others_can_read(store: Store, tmp_path: Path):
    create(store)
    with sqlite3.connect(tmp_path / "potstill.db") as db:
        assert db.execute("select id, status from runs").fetchall() == [("one", "queued")]
