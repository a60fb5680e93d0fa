"""Fifty times SIGKILL for the service's process, at random moments, under load."""

from __future__ import annotations

from pathlib import Path

from tests.api_kills import survive
from tests.databases import server, url

__all__ = ["server", "url"]  # fixtures

KILLS = 50


def test_fifty_kills_lose_no_acknowledged_run_and_no_event(tmp_path: Path, url: str):
    print(survive(tmp_path, url, kills=KILLS, seed=1))
