"""How an operator gets the first key: shown once on a laptop, in a private file on a server, made only when needed."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.service.serve import admin_key
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from potstill.errors import ConfigError
from tests.services import options

ANYWHERE = "0.0.0.0"  # noqa: S104 - nothing listens here


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(Database(f"sqlite:///{tmp_path / 'keys.db'}"))
    yield opened
    opened.close()


def test_on_loopback_it_is_shown_once(store: Store, tmp_path: Path):
    said: list[str] = []
    for _ in range(2):
        admin_key(store, options(tmp_path), said.append)
    assert len(said) == 1
    assert "shown once): ps_" in said[0]
    assert store.keys.list()[0].principal.sees_all


def test_a_service_that_others_reach_writes_it_to_a_private_file_and_does_not_show_it(store: Store, tmp_path: Path):
    said: list[str] = []
    file = tmp_path / "key"
    for _ in range(2):  # started again it makes no other, and minds no file
        admin_key(store, options(tmp_path, host=ANYWHERE, key_file=file), said.append)
    key = file.read_text().strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert said == [f"an administrator's API key is in {file}"]
    assert key not in said[0]
    assert store.keys.bearer(key) is not None


def test_of_services_that_start_together_one_makes_it(store: Store, tmp_path: Path):
    said: list[str] = []
    asked = options(tmp_path, host=ANYWHERE, key_file=tmp_path / "key")
    with ThreadPoolExecutor(4) as services:
        for started in [services.submit(admin_key, store, asked, said.append) for _ in range(4)]:
            started.result()
    assert len(said) == len(store.keys.list()) == 1


def test_without_a_file_it_is_refused_and_nothing_is_made(store: Store, tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no API key yet; name a --key-file"):
        admin_key(store, options(tmp_path, host=ANYWHERE), print)
    assert store.keys.list() == []


def test_a_file_that_exists_is_not_overwritten_and_nothing_is_made(store: Store, tmp_path: Path):
    (tmp_path / "key").write_text("mine")
    with pytest.raises(ConfigError, match="File exists"):
        admin_key(store, options(tmp_path, key_file=tmp_path / "key"), print)
    assert (tmp_path / "key").read_text() == "mine"
    assert store.keys.list() == []
