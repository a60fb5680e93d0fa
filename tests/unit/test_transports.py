"""A payload that is open stays as it is, whatever is published after it and whoever is killed."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from potstill.errors import StaleWeights, WeightsError
from potstill.transports import Payload, Transport
from potstill.transports.delta import Delta, difference, patched
from potstill.transports.disk import Disk
from potstill.transports.object_store import ObjectStore
from potstill.transports.shared_memory import SharedMemory, sweep
from potstill.weights import Bytes, pack, unpack

SIZE = 1 << 16


def content(version: int, nbytes: int = SIZE) -> Bytes:
    return np.random.default_rng(version).integers(0, 256, nbytes, dtype=np.uint8)


def send(transport: Transport, version: int, nbytes: int = SIZE) -> Payload:
    room = transport.room(nbytes)
    room[:] = content(version, nbytes)
    slip = transport.send(room, version)
    return slip if isinstance(transport, ObjectStore) else pickle.loads(pickle.dumps(slip))  # noqa: S301


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


@pytest.fixture(params=["shared_memory", "disk", "object_store", "delta over disk"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    if request.param == "object_store":
        request.getfixturevalue("local_ray")
    makers: dict[str, Callable[[], Transport]] = {
        "shared_memory": lambda: SharedMemory(tmp_path),
        "disk": lambda: Disk(tmp_path / "weights"),
        "object_store": ObjectStore,
        "delta over disk": lambda: Delta(Disk(tmp_path / "weights", keep=4)),
    }
    made = makers[request.param]()
    yield made
    made.close()


def test_what_is_opened_is_what_was_sent_and_cannot_be_written(transport: Transport) -> None:
    kept: dict[str, object] = {}
    for version, nbytes in enumerate((SIZE, SIZE, SIZE // 2, 2 * SIZE)):
        opened = send(transport, version, nbytes).open(kept)
        assert (opened == content(version, nbytes)).all()
        assert not opened.flags.writeable


def test_a_version_that_is_being_read_outlives_any_number_of_newer_ones(transport: Transport) -> None:
    kept: dict[str, object] = {}
    view = send(transport, 0).open(kept)[100:200]  # a view keeps the whole, as an engine's weights do
    later = [send(transport, version).open({}) for version in range(1, 6)]
    gc.collect()
    assert (view == content(0)[100:200]).all()
    for version, opened in enumerate(later, start=1):
        assert (opened == content(version)).all()


def test_what_is_open_survives_the_closing_of_its_transport(transport: Transport) -> None:
    opened = send(transport, 3).open({})
    transport.close()
    assert (opened == content(3)).all()


def test_two_segments_take_turns_and_a_reader_costs_a_third_only_while_it_reads(tmp_path: Path) -> None:
    transport = SharedMemory(tmp_path)
    for version in range(5):
        send(transport, version)
    assert len(list(tmp_path.glob("*/*"))) == 2
    kept: dict[str, object] = {}
    held = send(transport, 5).open(kept)
    for version in range(6, 10):
        send(transport, version)
    assert len(list(tmp_path.glob("*/*"))) == 3
    del held
    for version in range(10, 13):
        send(transport, version)
    assert len(list(tmp_path.glob("*/*"))) == 2
    transport.close()
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_was_written_over_is_stale_and_not_a_mixture(tmp_path: Path) -> None:
    transport = SharedMemory(tmp_path)
    slips = [send(transport, version) for version in range(4)]
    kept: dict[str, object] = {}
    for version in (0, 1):
        with pytest.raises(StaleWeights, match=f"weights version {version}: .* ask for the newest"):
            slips[version].open(kept)
    assert (slips[3].open(kept) == content(3)).all()
    room = transport.room(SIZE)  # over version 2, which is older than the newest
    with pytest.raises(StaleWeights, match="a newer one is being written over it"):
        slips[2].open(kept)
    transport.send(room, 4)
    transport.close()
    with pytest.raises(StaleWeights, match="gone"):
        slips[3].open(kept)


def test_a_receiver_lets_go_of_segments_that_are_removed(tmp_path: Path) -> None:
    kept: dict[str, object] = {}
    for _ in range(3):
        transport = SharedMemory(tmp_path)
        send(transport, 1).open(kept)
        transport.close()
    assert len(kept) == 1


def test_memory_that_is_full_is_an_error_that_names_the_fix() -> None:
    transport = SharedMemory()
    with pytest.raises(WeightsError, match=r"no room for \d+ MiB .*shm-size.*object_store"):
        transport.room(1 << 50)
    transport.close()


PUBLISH_AND_WAIT = """
import sys, numpy as np
from pathlib import Path
from potstill.transports.shared_memory import SharedMemory
transport = SharedMemory(Path(sys.argv[1]))
room = transport.room(1 << 16)
room[:] = 7
print(transport.send(room, 1).path, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_owner_left_is_swept_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH_AND_WAIT, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    paths = [Path(owner.stdout.readline().strip()) for owner in owners if owner.stdout]
    assert all(path.exists() for path in paths)
    os.kill(owners[0].pid, signal.SIGKILL)
    owners[0].wait()
    assert paths[0].exists()
    SharedMemory(tmp_path).close()
    assert not paths[0].parent.exists()
    assert paths[1].exists()
    owners[1].communicate("")
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


READ_AND_WAIT = """
import pickle, sys
slip = pickle.load(sys.stdin.buffer)
opened = slip.open({})
print("open", flush=True)
while True: pass
"""


def test_the_lease_of_a_killed_reader_ends_with_it(tmp_path: Path) -> None:
    transport = SharedMemory(tmp_path)
    slip = send(transport, 0)
    reader = subprocess.Popen([sys.executable, "-c", READ_AND_WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write(pickle.dumps(slip))
    reader.stdin.close()
    reader.stdout.readline()
    for version in range(1, 4):
        send(transport, version)
    assert len(list(tmp_path.glob("*/*"))) == 3
    os.kill(reader.pid, signal.SIGKILL)
    reader.wait()
    for version in range(4, 7):
        send(transport, version)
    assert len(list(tmp_path.glob("*/*"))) == 2
    transport.close()


def test_files_that_are_left_are_removed_and_a_full_disk_says_so(tmp_path: Path) -> None:
    transport = Disk(tmp_path)
    for version in range(4):
        send(transport, version)
    assert len(list(tmp_path.iterdir())) == 2
    again = Disk(tmp_path)
    assert list(tmp_path.iterdir()) == []
    tmp_path.rmdir()
    with pytest.raises(WeightsError, match="cannot be written"):
        send(again, 1)


def test_a_delta_is_small_where_little_changed_and_lost_nothing(tmp_path: Path) -> None:
    old = content(0, 20 << 20)
    new = old.copy()
    new[np.random.default_rng(1).choice(old.size, old.size // 100, replace=False)] ^= 0x55
    delta = difference(old, new)
    assert old.size / 16 < delta.size < old.size / 10
    assert (patched(old, delta) == new).all()
    assert (patched(old, difference(old, old)) == old).all()
    assert difference(old[:4], new[:4]).size <= 5


def test_who_does_not_hold_the_version_before_a_delta_takes_the_whole(tmp_path: Path) -> None:
    transport = Delta(Disk(tmp_path, keep=4))
    weights = np.zeros(4096, np.float32)
    versions = []
    for number in range(4):
        weights = weights.copy()
        weights[number] = 1.0
        described, payload = pack({"a": weights}, number, room=transport.room)
        versions.append((described, transport.send(payload, number), weights))
    sizes = sorted(path.stat().st_size for path in tmp_path.iterdir())
    assert sizes == [1026, 1026, 16384, 16384]  # one bit for two bytes, and the upper half of the one that changed
    steady: dict[str, object] = {}
    late: dict[str, object] = {}
    for kept, seen in ((steady, versions[2:]), (late, versions[3:])):
        for described, slip, expected in seen:
            assert (unpack(described, slip.open(kept))["a"] == expected).all()
    foreign = {"delta": ("another stream", 2, np.ones(16384, np.uint8))}
    assert (unpack(versions[3][0], versions[3][1].open(foreign))["a"] == versions[3][2]).all()


def test_float32_weights_that_all_changed_travel_whole(tmp_path: Path) -> None:
    transport = Delta(Disk(tmp_path, keep=4))
    send(transport, 0)
    assert send(transport, 1).changes is None


def test_a_delta_of_another_payload_is_refused() -> None:
    old, new = content(0), content(1)
    with pytest.raises(WeightsError, match="cannot be of a payload"):
        patched(old, np.zeros(9, np.uint8))
    with pytest.raises(WeightsError, match="ends before"):
        patched(old, difference(old, new)[:-1])


def test_a_publisher_that_is_slow_with_a_version_never_shows_half_of_it(tmp_path: Path) -> None:
    """A reader that asks again and again while versions are written sees whole ones or is told that they are stale."""
    transport = SharedMemory(tmp_path)
    slips = [send(transport, 0), send(transport, 1)]
    writing = subprocess.Popen([sys.executable, "-c", HAMMER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writing.stdin is not None
    pickle.dump(slips, writing.stdin)
    writing.stdin.close()
    began = time.monotonic()
    version = 2
    while writing.poll() is None and time.monotonic() - began < 10:
        room = transport.room(SIZE)
        room[: SIZE // 2] = content(version)[: SIZE // 2]
        room[SIZE // 2 :] = content(version)[SIZE // 2 :]
        transport.send(room, version)
        version += 1
    assert writing.wait() == 0
    transport.close()


HAMMER = """
import pickle, sys
import numpy as np
from potstill.errors import StaleWeights
slips, kept, stale = pickle.load(sys.stdin.buffer), {}, 0
for turn in range(4000):
    slip = slips[turn % 2]
    try:
        opened = slip.open(kept)
    except StaleWeights:
        stale += 1
        continue
    expected = np.random.default_rng(slip.version).integers(0, 256, 1 << 16, dtype=np.uint8)
    assert (opened == expected).all()
sys.exit(0 if stale else 1)
"""
