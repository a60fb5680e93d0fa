"""Keys, sessions, tokens and leases in both databases: hashes only, and one holder."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.service.keys import Signer
from orchestrator.service.principals import Scope
from orchestrator.service.runs import State
from orchestrator.service.store import Store
from orchestrator.service.store.idempotency import Once
from potstill.errors import Fenced
from tests.databases import server, url
from tests.stores import create, light, store

__all__ = ["light", "server", "store", "url"]  # fixtures


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
