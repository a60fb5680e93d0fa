"""What Prometheus reads of a running run is what its journal says, over a real port, by Prometheus's own parser."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.exposition import exposed
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import ConfigError
from potstill.journal import Journal, Status, read_jsonl
from tests.plain import PLAIN

OTHERS = {"worker_seconds_score": 0.25, "unscored_fraction": 0.125, "queue": 3, "weights_version": 2}

Samples = dict[tuple[str, ...], float]


def config_of(port: int | None) -> RunConfig:
    return parse(
        {
            "name": "counted",
            "method": "opd",
            "student": {"model": "student"},
            "teacher": {"kind": "server", "model": "teacher"},
            "data": {"kind": "jsonl", "path": "prompts.jsonl"},
            "rollout": {"prompts_per_step": 4, "sampling": {"max_new_tokens": 8}},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 2, "metrics_port": port},
        }
    )


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "counted")
    yield journal
    journal.close()


def url_of(journal: Journal) -> str:
    (served,) = [e for e in read_jsonl(journal.folder / "events.jsonl") if e["type"] == "metrics.served"]
    url: str = served["data"]["url"]
    return url


def scrape(journal: Journal) -> Samples:
    """By name and the values of labels, these in the order of their names."""
    text = httpx2.get(url_of(journal), trust_env=False, verify=PLAIN).raise_for_status().text
    families = text_string_to_metric_families(text)
    return {
        (s.name, *(s.labels[label] for label in sorted(s.labels))): s.value
        for family in families
        for s in family.samples
    }


def test_a_step_is_told_with_units_in_the_names(journal: Journal):
    with exposed(journal, config_of(0)):
        journal.metrics(1, {"loss": 0.5, "tokens_trained": 640, "seconds_train": 2.0, "seconds_step": 2.5})
        journal.metrics(2, {"loss": 0.25, "tokens_trained": 1280, "seconds_train": 1.0, "seconds_step": 1.5} | OTHERS)
        found = scrape(journal)
    expected = {
        ("potstill_run_steps_total",): 2.0,
        ("potstill_run_tokens_trained_total",): 1280.0,
        ("potstill_run_loss_nats",): 0.25,
        ("potstill_run_queue_rollouts",): 3.0,
        ("potstill_run_unscored_ratio",): 0.125,
        ("potstill_run_weights_version",): 2.0,
        ("potstill_run_stage_seconds_total", "train"): 3.0,
        ("potstill_run_worker_stage_seconds_total", "score"): 0.25,
        ("potstill_run_step_seconds_sum",): 4.0,
        ("potstill_run_step_seconds_count",): 2.0,
    }
    assert found.items() >= expected.items()
    assert ("potstill_run_info", "transformers", "opd", "counted") in found
    assert ("potstill_run_stage_seconds_total", "step") not in found


def test_what_was_not_measured_is_nan_and_never_zero(journal: Journal):
    with exposed(journal, config_of(0)):
        before = scrape(journal)
        journal.metrics(1, {"accuracy": math.nan, "loss": 0.5})
        after = scrape(journal)
    assert math.isnan(before["potstill_run_loss_nats",])
    assert math.isnan(after["potstill_run_accuracy_ratio",])
    assert after["potstill_run_loss_nats",] == 0.5


def test_a_step_that_is_done_again_counts_once(journal: Journal):
    with exposed(journal, config_of(0)):
        for step in (1, 2, 3, 2, 3, 4):
            journal.metrics(step, {"tokens_trained": 100 * step})
        found = scrape(journal)
    assert (found["potstill_run_steps_total",], found["potstill_run_tokens_trained_total",]) == (4.0, 400.0)


def test_refusals_are_counted_on_when_a_recovery_counts_anew(journal: Journal):
    with exposed(journal, config_of(0)):
        for step, refused in enumerate((1, 3, 0, 2), start=1):
            journal.metrics(step, {"refused": refused})
        assert scrape(journal)["potstill_run_prompts_refused_total",] == 5.0


def test_losses_recoveries_and_alarms_are_counted_by_their_events(journal: Journal):
    with exposed(journal, config_of(0)):
        journal.event("worker.lost", "one", level="warn")
        journal.event("worker.lost", "another", level="warn")
        journal.event("run.recovering", "the learner was lost", level="warn")
        journal.event("alarm.length", "answers inflate", level="warn")
        found = scrape(journal)
    expected = {
        ("potstill_run_worker_losses_total",): 2.0,
        ("potstill_run_recoveries_total",): 1.0,
        ("potstill_run_alarms_total", "length"): 1.0,
        ("potstill_run_events_total", "warn", "worker.lost"): 2.0,
    }
    assert found.items() >= expected.items()


def test_the_time_without_a_teacher_grows_while_it_is_away_and_then_stands(journal: Journal):
    def away() -> float:
        return scrape(journal)["potstill_run_waiting_teacher_seconds_total",]

    with exposed(journal, config_of(0)):
        journal.status(Status.RUNNING)
        assert away() == 0.0
        journal.status(Status.WAITING_TEACHER)
        assert scrape(journal)["potstill_run_status", "waiting_teacher"] == 1.0
        time.sleep(0.02)
        first = away()
        assert 0.02 <= first < away()
        journal.status(Status.RUNNING)
        assert scrape(journal).items() >= {
            ("potstill_run_status", "running"): 1.0, ("potstill_run_status", "waiting_teacher"): 0.0,
        }.items()  # fmt: skip
        assert away() == away() > first


def test_it_listens_on_loopback_only_and_ends_with_the_run(journal: Journal):
    with exposed(journal, config_of(0)):
        url = url_of(journal)
        assert url.startswith("http://127.0.0.1:")
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url, trust_env=False, verify=PLAIN)


def test_a_port_that_is_taken_is_refused_by_its_setting(journal: Journal):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"loop.metrics_port = {port} cannot"), exposed(journal, config_of(port)):
            pass


def test_without_a_port_nothing_is_served(journal: Journal):
    with exposed(journal, config_of(None)):
        journal.metrics(1, {"loss": 0.5})
    assert list(read_jsonl(journal.folder / "events.jsonl")) == []
