"""Weights from device to device come whole or stop aloud, and nobody waits for somebody else. Over gloo, on CPUs."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from learner.model import load_student
from learner.outbox import Outbox
from learner.publish import DevicePublisher
from potstill.config import StudentConfig
from potstill.errors import StaleWeights, WeightsError
from potstill.transports import rows
from potstill.transports.device import DevicePayload
from potstill.transports.route import Route
from potstill.weights import laid_out
from rollout_worker.incoming import Incoming
from tests.device_learner import DeviceLearner
from tests.tiny_models import save_tiny_model

TABLE = laid_out([(name, "float32", (size,)) for name, size in zip("abcdefgh", range(900, 1700, 100), strict=True)])
NBYTES = TABLE[-1].offset + rows.padded(TABLE[-1].nbytes)


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    made = Outbox("127.0.0.1", piece_bytes=1)
    yield made
    made.close()


def content(version: int) -> torch.Tensor:
    return torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(version))


def put(outbox: Outbox, version: int) -> DevicePayload:
    outbox.room(NBYTES).copy_(content(version))
    slip: DevicePayload = pickle.loads(pickle.dumps(outbox.send(version, TABLE)))  # noqa: S301
    return slip


def taken(slip: DevicePayload, kept: dict[str, object]) -> torch.Tensor:
    stream = slip.open(kept)
    stream.begin()
    whole = torch.cat([piece for _, piece in stream])
    stream.end()
    return whole


def test_what_comes_is_what_was_put_there_one_version_after_another_over_one_line(outbox: Outbox) -> None:
    kept: dict[str, object] = {}
    callers = set()
    for version in range(4):
        assert torch.equal(taken(put(outbox, version), kept), content(version))
        callers.add(kept["device"])
    assert len(callers) == 1


def test_pieces_are_cut_between_tensors_and_say_where_they_belong(outbox: Outbox) -> None:
    stream = put(outbox, 1).open({})
    stream.begin()
    starts = [start for start, _ in stream]
    assert starts == [entry.offset for entry in TABLE]


def test_a_version_that_was_written_over_is_stale_and_the_line_to_its_learner_still_good(outbox: Outbox) -> None:
    kept: dict[str, object] = {}
    old = put(outbox, 1)
    new = put(outbox, 2)
    with pytest.raises(StaleWeights, match="version 1: the learner has 2 now"):
        old.open(kept).begin()
    assert torch.equal(taken(new, kept), content(2))


def test_the_next_version_waits_for_whoever_takes_this_one_and_is_then_written(outbox: Outbox) -> None:
    stream = put(outbox, 1).open({})
    stream.begin()
    coming = iter(stream)
    next(coming)
    written = threading.Event()
    writing = threading.Thread(target=lambda: (put(outbox, 2), written.set()))
    writing.start()
    assert torch.equal(torch.cat([piece for _, piece in coming]), content(1)[TABLE[1].offset :])
    assert not written.is_set()
    stream.end()
    writing.join()
    assert written.is_set()


def test_a_version_that_is_being_written_is_nobodys_yet(outbox: Outbox) -> None:
    slip = put(outbox, 1)
    stream = slip.open({})
    outbox.room(NBYTES)
    with pytest.raises(StaleWeights, match="version 1"):
        stream.begin()


def test_workers_take_side_by_side_each_at_its_own_pace(outbox: Outbox) -> None:
    slip = put(outbox, 3)
    slow = slip.open({})
    slow.begin()
    coming = iter(slow)
    pieces = [next(coming)[1]]
    assert torch.equal(taken(slip, {}), content(3))
    pieces += [piece for _, piece in coming]
    slow.end()
    assert torch.equal(torch.cat(pieces), content(3))


def test_who_does_not_know_the_key_gets_nothing_and_disturbs_nobody(outbox: Outbox) -> None:
    slip = put(outbox, 1)
    with pytest.raises(StaleWeights, match="does not answer"):
        dataclasses.replace(slip, key=b"guessed").open({})
    assert "key" not in repr(slip)
    assert torch.equal(taken(slip, {}), content(1))


def test_a_learner_that_has_gone_is_stale_before_and_after_the_line_was_made(outbox: Outbox) -> None:
    slip = put(outbox, 1)
    kept: dict[str, object] = {}
    stream = slip.open(kept)
    outbox.close()
    with pytest.raises(StaleWeights, match="gone"):
        stream.begin()
    with pytest.raises(StaleWeights, match="does not answer"):
        slip.open(kept)


TAKE_ONE_AND_WAIT = """
import pickle, sys
stream = pickle.load(sys.stdin.buffer).open({})
stream.begin()
next(iter(stream))
print("begun", flush=True)
while True: pass
"""


def test_a_worker_that_is_killed_midway_is_its_own_loss(outbox: Outbox) -> None:
    slip = put(outbox, 1)
    worker = subprocess.Popen([sys.executable, "-c", TAKE_ONE_AND_WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(pickle.dumps(slip))
    worker.stdin.close()
    worker.stdout.readline()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert torch.equal(taken(put(outbox, 2), {}), content(2))


@pytest.fixture
def learner() -> Iterator[DeviceLearner]:
    made = DeviceLearner()
    yield made
    made.close()


def test_a_learner_that_is_killed_midway_is_noticed_at_once(learner: DeviceLearner, tmp_path: Path) -> None:
    version = learner.publish(save_tiny_model(tmp_path, seed=0), 1)
    stream = version.payload.open({})
    stream.begin()
    coming = iter(stream)
    next(coming)
    learner.kill()
    with pytest.raises(StaleWeights, match="version 1 stopped on its way"):
        list(coming)


@pytest.mark.parametrize("wire", [pytest.param("exact", marks=pytest.mark.long), "bfloat16"])
def test_what_a_worker_makes_of_it_is_the_learners_student(wire: str, learner: DeviceLearner, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0, tie_word_embeddings=True)
    version = learner.publish(folder, 1, wire=wire)
    weights = Incoming(folder, "float32").weights(version, version.payload.open({}))
    weights.begin()
    received = dict(weights)
    weights.end()
    student = load_student(StudentConfig(model=str(folder)), seed=0, device=torch.device("cpu"))
    expected = student.full_weights()
    assert received.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(received[name], weight.detach().to(getattr(torch, "float32" if wire == "exact" else wire)))


def test_a_damaged_tensor_is_named_before_it_is_handed_on(learner: DeviceLearner, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0)
    version = learner.publish(folder, 1)
    damaged = version.tensors[5].name
    learner.damage(damaged)
    weights = Incoming(folder, "float32").weights(version, version.payload.open({}))
    weights.begin()
    coming = iter(weights)
    assert [next(coming)[0] for _ in range(5)] == [entry.name for entry in version.tensors[:5]]
    with pytest.raises(WeightsError, match=f"other bytes came than were sent, of {damaged}"):
        next(coming)


def test_a_table_that_is_not_the_one_sent_is_refused_before_anything_comes(outbox: Outbox, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0)
    student = load_student(StudentConfig(model=str(folder)), seed=0, device=torch.device("cpu"))
    route = Route(transport="device", wire="exact", adapter_only=False, reason="")
    version = DevicePublisher(route, outbox).publish(student, version=1)
    incoming = Incoming(folder, "float32")
    stream = version.payload.open({})
    for changed in (
        dataclasses.replace(version, version=2),
        dataclasses.replace(version, checksums=(0, *version.checksums[1:])),
    ):
        with pytest.raises(WeightsError, match="table is not the one"):
            incoming.weights(changed, stream)
    with pytest.raises(WeightsError, match="missing tensors"):
        Incoming(save_tiny_model(tmp_path / "larger", seed=0, layers=3), "float32").weights(version, stream)
