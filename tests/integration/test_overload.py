"""A teacher server that is asked far more than it can do, by a load that takes its share of the same processors."""

from __future__ import annotations

from pathlib import Path

from bench.overload import measure
from tests.tiny_models import save_tiny_model


def test_at_a_hundred_times_its_capacity_a_server_refuses_politely_and_stays_well(tmp_path: Path):
    model = save_tiny_model(tmp_path / "tiny", seed=1, hidden=512, layers=4)
    seen = measure(model, seconds=3.0, times=100.0)
    assert seen["sent_times_capacity"] > 50
    assert set(seen["statuses"]) == {"200", "503"}
    assert (seen["refused_without_retry_after"], seen["broken_connections"]) == (0, 0)
    assert seen["accepted_p99_s"] < 4 * seen["full_queue_s"]
    assert seen["livez_p99_s"] < 0.1
    assert seen["rss_peak_bytes"] - seen["rss_before_bytes"] < 200 * 2**20
