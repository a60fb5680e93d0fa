"""What runs report, in both databases: events without gaps or doubles, statuses that move them, metrics."""

from __future__ import annotations

import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.reporting import Report
from orchestrator.service.runs import Failure, SequenceGap, State
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from potstill.errors import ServiceError
from tests.databases import server, url
from tests.stores import create, event, events, store, told

__all__ = ["server", "store", "url"]  # fixtures


def test_a_reported_event_is_kept_to_the_last_bit(store: Store):
    create(store)
    data = {"seconds": 0.1 + 0.2, "small": 5e-324, "deep": [{"text": 'a "b" \\ \u2028 é'}, None, 2**60], "empty": {}}
    sent = {"time": 1764419474.1234567, "message": 'ünïcode "quoted"\n\ttabbed', "data": data}
    store.runs.report("one", Report.model_validate({"events": [event(1, **sent), event(2, **sent)]}))
    kept = store.events.list("one", after=1, limit=10)
    assert [(one.seq, one.time, one.message, one.data) for one in kept] == [
        (seq, sent["time"], sent["message"], data) for seq in (2, 3)
    ]


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
