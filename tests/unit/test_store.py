"""Runs in the tables of both databases: one row per name and request, of owners, along the moves of their states."""

from __future__ import annotations

import threading
import time

import pytest
import sqlalchemy as sa

from orchestrator.reporting import Report
from orchestrator.service.runs import Failure, State
from orchestrator.service.scheduling import Usage
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.pages import Page
from orchestrator.service.store.runs import NewRun
from potstill.errors import ServiceError
from tests.databases import server, url
from tests.stores import ALICE, BOB, ROOT, create, event, status, store, told

__all__ = ["server", "store", "url"]  # fixtures


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
