"""The tables on both databases: one row per name, events without gaps or doubles, owners, leases, hashes only."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.reporting import Report
from orchestrator.service.keys import Signer
from orchestrator.service.principals import Limits, Principal, Scope
from orchestrator.service.runs import Failure, SequenceGap, State
from orchestrator.service.scheduling import Usage
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.migrations import upgrade
from orchestrator.service.store.pages import Page
from orchestrator.service.store.runs import NewRun
from orchestrator.service.store.schema import META
from potstill.errors import ConfigError, Fenced, ServiceError
from tests.databases import server, url
from tests.postgres import Postgres

__all__ = ["server", "url"]  # fixtures

ALICE = Principal(key_id="a", owner="alice", scopes=frozenset({Scope.RUNS_READ}), limits=Limits())
BOB = Principal(key_id="b", owner="bob", scopes=frozenset({Scope.RUNS_READ}), limits=Limits())
ROOT = Principal(key_id="r", owner="operator", scopes=frozenset({Scope.ADMIN}), limits=Limits())


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(Database(url))
    yield opened
    opened.close()


@pytest.fixture
def light(tmp_path: Path) -> Iterator[Store]:
    """On SQLite alone."""
    opened = Store(Database(f"sqlite:///{tmp_path / 'potstill.db'}"))
    yield opened
    opened.close()


def create(
    store: Store,
    name: str = "one",
    *,
    key: str | None = None,
    body: str = "b",
    who: Principal = ALICE,
    gpus: float = 0.0,
):
    config, metadata = {"name": name}, {"of": name}
    new = NewRun(id=name, submitted=config, config=config, owner=who.owner, metadata=metadata, gpus=gpus)
    return store.runs.create(new, Once(key_id=who.key_id, key=key, route="/v1/runs", body_digest=body))


def event(number: int, **changes: Any) -> dict[str, Any]:
    return {"seq": number, "time": 1.0, "type": "t", "level": "info", "message": f"m{number}", "data": {}} | changes


def events(*numbers: int, statuses: list | None = None) -> Report:
    return Report.model_validate({"events": [event(number) for number in numbers], "statuses": statuses or []})


def status(name: str, when: float = 2.0) -> Report:
    return events(statuses=[{"status": name, "time": when, "pid": 1}])


def told(store: Store, name: str = "one") -> list[str]:
    """Messages of the run's own events, as the database holds them."""
    return [event.message for event in store.events.list(name, after=0, limit=10_000) if event.type == "t"]


# The database itself


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


# The schema


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


# Runs


def test_a_run_survives_the_store(store: Store, url: str):
    made, replayed = create(store)
    again = Store(Database(url))
    assert (again.runs.get("one"), replayed) == (made, False)
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
    assert not store.runs.exists("two")


def test_fifty_of_the_same_request_at_once_make_one_run(store: Store):
    found: list[tuple[str, bool]] = []
    barrier = threading.Barrier(50)

    def ask() -> None:
        barrier.wait()
        run, replayed = create(store, key="same")
        found.append((run.id, replayed))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [("one", False)] + [("one", True)] * 49


def test_pages_follow_creation_in_both_directions(store: Store):
    for number in range(5):
        create(store, f"r{number}")
    page, more = store.runs.page(ALICE, Page(limit=2))
    assert ([run.id for run in page], more) == (["r4", "r3"], True)
    page, more = store.runs.page(ALICE, Page(limit=3, after="r3"))
    assert ([run.id for run in page], more) == (["r2", "r1", "r0"], False)
    page, _ = store.runs.page(ALICE, Page(limit=2, after="r1", ascending=True))
    assert [run.id for run in page] == ["r2", "r3"]
    with pytest.raises(ServiceError, match="after"):
        store.runs.page(ALICE, Page(after="nobody"))


def test_a_page_holds_what_was_asked_for(store: Store):
    for name in ("one", "two"):
        create(store, name)
    store.runs.move("two", State.STARTING, "m")
    assert [run.id for run in store.runs.page(ALICE, Page(), states=[State.STARTING])[0]] == ["two"]
    assert [run.id for run in store.runs.page(ALICE, Page(), metadata={"of": "one"})[0]] == ["one"]
    assert store.runs.page(ALICE, Page(), created_after=time.time() + 9)[0] == []
    assert store.runs.counts()[State.QUEUED] == 1


@pytest.mark.parametrize("name", ["of", 'o"f', "$.of", "o.f", "[0]", "of'", "*", "é\n", "%"])
def test_metadata_may_have_any_name_and_is_found_by_it_alone(store: Store, name: str):
    for run, metadata in (("one", {name: "x"}), ("two", {name: "y"}), ("three", {"of ": "x"})):
        new = NewRun(id=run, submitted={}, config={}, owner="alice", metadata=metadata)
        store.runs.create(new, Once(key_id="a", key=None, route="/v1/runs", body_digest="b"))
    assert [run.id for run in store.runs.page(ALICE, Page(), metadata={name: "x"})[0]] == ["one"]
    assert [run.id for run in store.runs.page(ALICE, Page(), metadata={name: "x", "of ": "x"})[0]] == []


def test_what_a_database_cannot_keep_is_refused_or_kept_without_it(store: Store):
    create(store)
    store.runs.report("one", Report.model_validate({"events": [event(1, message="a\0b")]}))
    assert told(store) == ["a\ufffdb"]
    with pytest.raises(ServiceError) as caught:
        store.runs.get("a\0b")
    assert caught.value.status in {404, 400}  # SQLite has no such run, PostgreSQL refuses to look for it


def test_a_reported_event_is_kept_to_the_last_bit(store: Store):
    create(store)
    data = {"seconds": 0.1 + 0.2, "small": 5e-324, "deep": [{"text": 'a "b" \\ \u2028 é'}, None, 2**60], "empty": {}}
    sent = {"time": 1764419474.1234567, "message": 'ünïcode "quoted"\n\ttabbed', "data": data}
    store.runs.report("one", Report.model_validate({"events": [event(1, **sent), event(2, **sent)]}))
    kept = store.events.list("one", after=1, limit=10)
    assert [(one.seq, one.time, one.message, one.data) for one in kept] == [
        (seq, sent["time"], sent["message"], data) for seq in (2, 3)
    ]


def test_a_server_that_has_ended_the_connections_is_asked_over_new_ones(server: Postgres):
    store = Store(Database(server.database("ended")))
    create(store)
    server.cut("ended")
    assert store.runs.get("one").id == "one"
    server.cut("ended")
    store.runs.report("one", Report.model_validate({"events": [event(1)]}))
    assert told(store) == ["m1"]
    store.close()


def test_the_record_of_a_run_is_stored_with_it_or_not_at_all(store: Store):
    def admission(db: sa.Connection) -> None:
        store.audit.record(ALICE, "run.create", "one", request_id="r", within=db)

    new = NewRun(id="one", submitted={}, config={}, owner=ALICE.owner)
    request = Once(key_id=ALICE.key_id, key=None, route="/v1/runs", body_digest="b")
    store.runs.create(new, request, admission)
    with pytest.raises(ServiceError, match="a run named one exists"):
        store.runs.create(new, request, admission)
    assert [record["object"] for record in store.audit.list(limit=10, before=None)] == ["one"]


def test_what_belongs_to_another_owner_does_not_exist(store: Store):
    create(store, who=BOB)
    assert store.runs.page(ALICE, Page())[0] == []
    for ask in (
        lambda: store.runs.get("one", ALICE),
        lambda: store.runs.move("one", State.CANCELLING, "m", viewer=ALICE),
        lambda: store.runs.edit("one", ALICE, {"notes": "n"}, revision=1),
        lambda: store.runs.delete("one", ALICE),
        lambda: store.runs.page(ALICE, Page(after="one")),
    ):
        with pytest.raises(ServiceError) as caught:
            ask()
        assert caught.value.status in {404, 400}
    assert [run.id for run in store.runs.page(ROOT, Page())[0]] == ["one"]


def test_a_change_needs_the_revision_that_was_read(store: Store):
    create(store)
    assert store.runs.edit("one", ALICE, {"notes": "first", "priority": 3}, revision=1).revision == 2
    with pytest.raises(ServiceError) as caught:
        store.runs.edit("one", ALICE, {"notes": "second"}, revision=1)
    assert (caught.value.status, store.runs.get("one").notes) == (412, "first")


def test_a_move_is_an_event_and_a_final_state_stays(store: Store):
    create(store)
    failure = Failure(type="WorkerLost", category="system", message="gone", log_tail="last words")
    run = store.runs.move("one", State.FAILED, "it died", failure)
    assert (run.state, run.error) == (State.FAILED, failure)
    assert run.finished_at is not None
    with pytest.raises(ServiceError) as caught:
        store.runs.move("one", State.RUNNING, "no")
    assert caught.value.code == "illegal_transition"
    assert [event.data["status"] for event in store.events.list("one", after=0, limit=9)] == ["queued", "failed"]


def test_a_retry_begins_another_attempt_under_a_job_of_its_own(store: Store):
    first, _ = create(store)
    with pytest.raises(ServiceError, match="only a run that failed"):
        store.runs.again("one", "m", retry=True)
    store.runs.move("one", State.FAILED, "it died")
    run = store.runs.again("one", "m", ALICE, retry=True)
    assert (run.state, run.attempt, run.finished_at, run.error) == (State.QUEUED, 2, None, None)
    assert run.submission_id != first.submission_id


def test_hours_are_counted_while_a_run_has_processes(store: Store):
    create(store)
    store.runs.launched("one")
    launched = store.runs.get("one").launched_at
    assert launched is not None
    store.runs.report("one", status("running", launched + 1))
    store.runs.move("one", State.PAUSING, "m")
    store.runs.report("one", status("cancelled", launched + 36))
    run = store.runs.get("one")
    assert (run.state, run.launched_at, round(run.busy_s)) == (State.PAUSED, None, 36)


def test_what_a_key_has_used_is_the_sum_of_its_runs(store: Store):
    assert store.runs.usage("a") == Usage(
        runs=0, unfinished=0, running=0, gpu_hours=0.0, teacher_tokens=0, teacher_usd=0.0
    )
    for name, gpus in (("done", 2.0), ("on", 1.0), ("waits", 0.0)):
        create(store, name, gpus=gpus)
    create(store, "other", who=BOB, gpus=8.0)
    for name in ("done", "on"):
        store.runs.launched(name)
    launched = store.runs.get("done").launched_at
    assert launched is not None
    store.runs.report("done", status("succeeded", launched + 1800.0))
    store.runs.spent("done", teacher_tokens=5, teacher_usd=0.5)
    used = store.runs.usage("a")
    assert (used.runs, used.unfinished, used.running, used.teacher_tokens, used.teacher_usd) == (3, 2, 1, 5, 0.5)
    assert used.gpu_hours == pytest.approx(1.0, abs=0.01)


def test_a_deleted_run_leaves_its_name_free_and_an_active_one_stays(store: Store):
    create(store)
    with pytest.raises(ServiceError, match="cancel it first"):
        store.runs.delete("one", ALICE)
    store.runs.move("one", State.CANCELLED, "m")
    store.runs.delete("one", ALICE)
    create(store)
    assert store.events.last("one") == 1


# Reports


def test_a_replayed_record_is_accepted_and_not_doubled(store: Store):
    create(store)
    assert store.runs.report("one", events(1, 2))["events"] == 2
    assert store.runs.report("one", events(1, 2, 3))["events"] == 3
    assert told(store) == ["m1", "m2", "m3"]


def test_a_gap_is_refused_with_the_number_that_is_wanted_and_nothing_is_kept(store: Store):
    create(store)
    store.runs.report("one", events(1))
    with pytest.raises(SequenceGap) as caught:
        store.runs.report("one", events(2, 4, statuses=[{"status": "running", "time": 1.0}]))
    assert (caught.value.stream, caught.value.wanted, caught.value.status) == ("events", 3, 409)
    assert told(store) == ["m1"]
    assert store.runs.get("one").state is State.QUEUED


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.lists(st.integers(1, 6), max_size=6), max_size=8))
def test_whatever_is_sent_the_run_holds_a_prefix_of_its_log(batches: list[list[int]]):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Database(f"sqlite:///{folder}/potstill.db"))
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
                    store.runs.report("one", events(*batch))
            else:
                assert store.runs.report("one", events(*batch)) == {"events": reached, "metrics": 0}
                held = reached
            assert told(store) == [f"m{number}" for number in range(1, held + 1)]
        seqs = [event.seq for event in store.events.list("one", after=0, limit=100)]
        assert seqs == list(range(1, held + 2))  # and one for the state it began in
        store.close()


def test_writers_at_the_same_time_number_events_without_gaps(store: Store):
    for name in ("one", "two"):
        create(store, name)
    errors: list[Exception] = []

    def write(name: str) -> None:
        try:
            for number in range(1, 21):
                store.runs.report(name, events(number))
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
    assert store.runs.get("one").state_message == "the run is stored and waits for its turn"
    running = {"status": "running", "time": 2.0, "pid": 1, "code_version": "0.1.0"}
    store.runs.report("one", events(statuses=[running]))
    run = store.runs.get("one")
    assert (run.state_since, run.state_message) == (2.0, "the run reports that it is running")
    store.runs.report("one", events(1, statuses=[running | {"status": "failed", "time": 3.0, "error": error}]))
    store.runs.report("one", events(2, statuses=[running | {"status": "succeeded", "time": 4.0}]))
    run = store.runs.get("one")
    assert (run.state, run.started_at, run.finished_at) == (State.FAILED, 2.0, 3.0)
    assert (run.state_since, run.code_version) == (3.0, "0.1.0")
    assert run.error == Failure(type="NonFinite", category="system", message="loss is NaN")
    assert told(store) == ["m1", "m2"]


def test_metrics_become_events_and_a_missing_number_stays_missing(store: Store):
    create(store)
    record = {"seq": 1, "time": 5.0, "step": 3, "loss": 0.25, "accuracy": None}
    assert store.runs.report("one", Report.model_validate({"metrics": [record]})) == {"events": 0, "metrics": 1}
    event = store.events.list("one", after=1, limit=9)[0]
    assert (event.type, event.data) == ("metrics", {"step": 3, "loss": 0.25, "accuracy": None})
    run = store.runs.get("one")
    assert (run.step, run.latest["accuracy"], run.heartbeat_at is not None) == (3, None, True)


def test_a_step_that_was_done_again_counts_once(store: Store):
    create(store)
    steps = [(1, 0.5), (2, 0.4), (3, 0.3), (2, 0.45), (3, 0.35)]
    records = [{"seq": seq, "time": 1.0, "step": step, "loss": loss} for seq, (step, loss) in enumerate(steps, 1)]
    store.runs.report("one", Report.model_validate({"metrics": records}))
    assert [(row["step"], row["loss"]) for row in store.events.metrics("one")] == [(1, 0.5), (2, 0.45), (3, 0.35)]


# Keys, sessions, tokens


def test_a_key_opens_and_is_nowhere_on_disk(light: Store, tmp_path: Path):
    assert not light.keys.any()
    made, key = light.keys.create(owner="alice", label="mine", scopes=[Scope.RUNS_READ])
    session = light.keys.open_session(made.id, 60.0)
    assert light.keys.bearer(key) == light.keys.session(session) == made.principal
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.split("_", 2)[2].encode() not in written
    assert session.encode() not in written


def test_of_those_who_ask_for_one_key_at_once_one_gets_it(store: Store):
    asked = Once(key_id="admin", key="one", route="/v1/keys", body_digest="0")

    def ask(_number: int) -> tuple[str, str | None]:
        key, secret = store.keys.create(owner="alice", label="", scopes=[], once=asked)
        return key.id, secret

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(8)))
    assert len({key_id for key_id, _ in answers}) == 1
    assert [secret is not None for _, secret in answers].count(True) == 1


@pytest.mark.parametrize("wrong", ["", "ps", "ps__", "ps_nobody_secret", "Bearer", "ps_\ud800_x"])
def test_no_other_text_is_a_key_or_a_session(light: Store, wrong: str):
    _, key = light.keys.create(owner="alice", label="", scopes=[])
    assert light.keys.bearer(wrong) is None
    assert light.keys.bearer(key[:-1]) is None
    assert light.keys.session(wrong) is None


def test_keys_end_by_time_by_rotation_and_by_revocation_and_their_sessions_with_them(store: Store):
    _, old = store.keys.create(owner="alice", label="", scopes=[], expires_at=time.time() - 1)
    assert store.keys.bearer(old) is None
    made, key = store.keys.create(owner="alice", label="", scopes=[])
    session = store.keys.open_session(made.id, 60.0)
    again, fresh = store.keys.rotate(made.id)
    assert (store.keys.bearer(key), store.keys.session(session), again.id) == (None, None, made.id)
    session = store.keys.open_session(made.id, 60.0)
    assert store.keys.bearer(fresh) == made.principal
    store.keys.revoke(made.id)
    assert (store.keys.bearer(fresh), store.keys.session(session)) == (None, None)


def test_a_token_is_of_one_job_alone():
    signer = Signer(b"secret")
    token = signer.token("potstill-one-1")
    assert signer.matches("potstill-one-1", token)
    assert not signer.matches("potstill-one-2", token)
    assert not Signer(b"other").matches("potstill-one-1", token)
    assert not signer.matches("potstill-one-1", "\ud800")


# Leases


def test_a_lease_has_one_holder_until_it_runs_out_or_is_given_back(store: Store):
    first = store.leases.take("s", "one", 60.0)
    assert first is not None
    assert store.leases.take("s", "two", 60.0) is None
    assert store.leases.take("s", "one", 60.0) == first
    store.leases.give_back(first)
    second = store.leases.take("s", "two", 60.0)
    assert second is not None
    assert second.token > first.token


def test_who_has_lost_the_lease_writes_nothing(store: Store):
    create(store)
    first = store.leases.take("s", "one", 0.0)
    assert first is not None
    frozen = store.under(first)
    frozen.runs.move("one", State.STARTING, "mine")  # nobody has taken over yet
    second = store.leases.take("s", "two", 60.0)
    assert second is not None
    with pytest.raises(Fenced, match="taken over"):
        frozen.runs.move("one", State.FAILED, "late")
    store.under(second).runs.move("one", State.RUNNING, "mine")
    assert store.runs.get("one").state is State.RUNNING


def test_two_that_reach_for_a_new_lease_get_one(store: Store):
    found = []
    barrier = threading.Barrier(8)

    def reach(name: str) -> None:
        barrier.wait()
        found.append(store.leases.take("s", name, 60.0))

    threads = [threading.Thread(target=reach, args=(f"t{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in found) == 1
