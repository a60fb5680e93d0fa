"""New weights pushed to a running teacher: a real (tiny) model behind real HTTP."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from potstill.codec import JSON, SAFETENSORS
from potstill.config_teachers import Calling
from potstill.errors import TeacherRefused
from potstill.teachers.opening import open_endpoint
from potstill.teachers.server import TeacherClient
from potstill.weights import pack
from teacher_server.app import create_app
from teacher_server.batching import ScoringQueue
from teacher_server.engine import ScoringTeacher
from teacher_server.limits import Limits
from teacher_server.transformers_backbone import TransformersBackbone
from teacher_server.weights_route import Versions
from tests.builders_teacher import KEY
from tests.plain import PLAIN
from tests.served import serving
from tests.tiny_models import save_tiny_model

BEARER = {"authorization": f"Bearer {KEY}"}
TOLERANCE = 1e-4  # nats
CONTEXT, COMPLETION = [1, 2, 3], [7, 8, 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("weights")
    return [save_tiny_model(root / str(seed) / "tiny", seed=seed, layers=1) for seed in range(3)]


@contextmanager
def teaching(folder: Path, *, accept_weights: bool = True) -> Iterator[str]:
    teacher = ScoringTeacher(TransformersBackbone(folder, dtype="float32"), folder, name="tiny")
    queue = ScoringQueue(teacher.score, capacity=100_000, batch_tokens=100, window_s=0.0)
    with serving(
        create_app(
            teacher,
            queue,
            Limits(max_tokens=1000, queue_tokens=100_000),
            KEY,
            Versions(teacher, folder) if accept_weights else None,
        )
    ) as url:
        yield url


@pytest.fixture
def server(folders: list[Path]) -> Iterator[str]:
    with teaching(folders[0]) as url:
        yield url


def weights_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def packed(weights: Mapping[str, Tensor], **metadata: str) -> bytes:
    return safetensors.torch.save(dict(weights), metadata)


def push(server: str, weights: Mapping[str, Tensor], version: int, **query: str) -> httpx2.Response:
    return send(server, packed(weights, version=str(version)), version=str(version), **query)


def send(server: str, body: bytes, *, kind: str = SAFETENSORS, **query: str) -> httpx2.Response:
    headers = {**BEARER, "content-type": kind}
    return httpx2.post(
        f"{server}/v1/weights", content=body, params=query, headers=headers, timeout=30, trust_env=False, verify=PLAIN
    )


def score(server: str, items: int = 1, **facts: Any) -> httpx2.Response:
    listed = [{"id": str(n), "context_ids": CONTEXT, "completion_ids": COMPLETION} for n in range(items)]
    body = {"model": "tiny", "items": listed, **facts}
    headers = {**BEARER, "content-type": JSON}
    return httpx2.post(f"{server}/v1/score", json=body, headers=headers, timeout=30, trust_env=False, verify=PLAIN)


def by(weights: Mapping[str, Tensor], folder: Path) -> list[float]:
    """The log-probs of COMPLETION under these weights in the model of `folder`, from a plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    with torch.inference_mode():
        logits = model(torch.tensor([CONTEXT + COMPLETION])).logits[0]
    return (
        torch.log_softmax(logits, -1)[len(CONTEXT) - 1 : -1].gather(1, torch.tensor(COMPLETION)[:, None])[:, 0].tolist()
    )


def check_scored_by(answer: httpx2.Response, wanted: list[float], revision: str) -> None:
    assert answer.status_code == 200, answer.text
    assert answer.json()["revision"] == revision
    for item in answer.json()["items"]:
        assert item["sampled"] == pytest.approx(wanted, abs=TOLERANCE)


def test_after_a_push_the_teacher_is_the_pushed_model_and_says_so(server, folders):
    new = weights_of(folders[1])
    answer = push(server, new, 7)
    assert (answer.status_code, answer.json()["revision"]) == (200, "v7")
    check_scored_by(score(server), by(new, folders[1]), "v7")
    able = httpx2.get(f"{server}/v1/capabilities", headers=BEARER, trust_env=False, verify=PLAIN).json()
    assert able["revision"] == "v7"


def test_a_client_pinned_to_the_old_weights_is_refused_after_a_push(server, folders):
    before = score(server).json()["revision"]
    assert score(server, expect_revision=before).status_code == 200
    assert push(server, weights_of(folders[1]), 1).status_code == 200
    refused = score(server, expect_revision=before)
    assert (refused.status_code, refused.json()["error"]["code"]) == (412, "revision_mismatch")
    assert score(server, expect_revision="v1").status_code == 200


def test_equal_and_older_versions_are_409_and_not_to_be_tried_again(server, folders):
    new = weights_of(folders[1])
    assert push(server, new, 5).status_code == 200
    for version in (5, 4):
        answer = push(server, weights_of(folders[2]), version)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "stale_weights")
        assert answer.headers["x-should-retry"] == "false"
    check_scored_by(score(server), by(new, folders[1]), "v5")


def test_an_average_is_taken_in_float32_of_what_was_served_before(server, folders):
    first, second, third = (weights_of(folder) for folder in folders)
    assert push(server, second, 1, ema_decay="0.75").status_code == 200
    once = {name: 0.75 * first[name] + 0.25 * second[name] for name in first}
    check_scored_by(score(server), by(once, folders[0]), "v1")
    assert push(server, third, 2, ema_decay="0.5").status_code == 200
    twice = {name: 0.5 * once[name] + 0.5 * third[name] for name in first}
    check_scored_by(score(server), by(twice, folders[0]), "v2")


class Remembering:
    """A teacher that only remembers what it was given."""

    def load_weights(self, weights: Mapping[str, Tensor], *, revision: str) -> None:
        self.weights, self.revision = weights, revision


def test_an_average_keeps_the_steps_that_bfloat16_would_lose(folders, tmp_path):
    """A thousandth of the way is less than bfloat16's step: rounded each time, the teacher would never move."""
    first = weights_of(folders[0])
    halves = {name: weight.bfloat16() for name, weight in weights_of(folders[1]).items()}
    teacher, file = Remembering(), tmp_path / "pushed"
    versions = Versions(teacher, folders[0])
    for version in range(10):
        file.write_bytes(packed(halves, version=str(version)))
        versions.load(versions.read(file, version, 0.999), version)
    assert teacher.revision == "v9"
    for name, weight in teacher.weights.items():
        wanted = 0.999**10 * first[name] + (1 - 0.999**10) * halves[name].float()
        torch.testing.assert_close(weight, wanted, atol=1e-6, rtol=1e-5)


def changed(name: str, value: Tensor | None) -> Any:
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        others = {key: tensor for key, tensor in weights.items() if key != name}
        return others if value is None else {**others, name: value}

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("lm_head.weight", None), "lack 1 tensors, among them lm_head.weight"),
        (changed("extra", torch.zeros(2)), "have unknown 1 tensors, among them extra"),
        (changed("lm_head.weight", torch.zeros(3, 64)), "lm_head.weight is F32 [3, 64]"),
        (changed("model.norm.weight", torch.zeros(64, dtype=torch.int64)), "model.norm.weight is I64"),
    ],
)
def test_weights_of_another_model_are_400_and_change_nothing(shared, folders, change, words):
    answer = push(shared, change(weights_of(folders[1])), 9)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_weights")
    assert words in answer.json()["error"]["message"]
    check_unchanged(shared, folders)


@pytest.fixture(scope="module")
def shared(folders: list[Path]) -> Iterator[str]:
    """For pushes that are refused."""
    with teaching(folders[0]) as url:
        yield url


def check_unchanged(server: str, folders: list[Path]) -> None:
    answer = score(server)
    check_scored_by(answer, by(weights_of(folders[0]), folders[0]), answer.json()["revision"])
    assert not answer.json()["revision"].startswith("v")


def with_hash(folder: Path, digest: str | None = None) -> bytes:
    """A push with the sha256 of all that follows the header, or with a `digest` that is not it."""
    weights = weights_of(folder)
    plain = packed(weights, version="9")
    (size,) = struct.unpack_from("<Q", plain)
    return packed(weights, version="9", sha256=digest or hashlib.sha256(plain[8 + size :]).hexdigest())


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body[:-1],
        lambda body: b"",
        lambda body: struct.pack("<Q", 2**62) + body[8:],
        lambda body: body.replace(b'"version":"9"', b'"version":"8"'),
        lambda body: body[:-4] + b"\x00\x00\x00\x40",
    ],
)
def test_a_damaged_push_is_400_and_changes_nothing(shared, folders, damage):
    assert send(shared, damage(with_hash(folders[1])), version="9").status_code == 400
    check_unchanged(shared, folders)


def test_an_undamaged_push_with_its_hash_is_loaded(server, folders):
    assert send(server, with_hash(folders[1]), version="9").status_code == 200


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ({}, 400, "version"),
        ({"version": "-1"}, 400, "version"),
        ({"version": "1e3"}, 400, "version"),
        ({"version": "9" * 5000}, 400, "version"),
        ({"version": "1", "ema_decay": "1.0"}, 400, "ema_decay"),
        ({"version": "1", "ema_decay": "nan"}, 400, "ema_decay"),
    ],
)
def test_a_wrong_query_is_refused_by_name(shared, query, status, param):
    answer = send(shared, b"x", **query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_the_bodys_size_and_type_are_checked_before_it_is_read(shared, folders):
    size = (folders[0] / "model.safetensors").stat().st_size
    assert send(shared, bytes(size + 2**23), version="1").status_code == 413
    assert send(shared, b"{}", kind=JSON, version="1").status_code == 415
    chunked = httpx2.post(
        f"{shared}/v1/weights?version=1",
        content=iter([b"x"]),
        headers={**BEARER, "content-type": SAFETENSORS},
        trust_env=False,
        verify=PLAIN,
    )
    assert chunked.status_code == 411


def test_a_server_that_was_not_started_to_take_weights_has_no_such_route(folders):
    with teaching(folders[0], accept_weights=False) as running:
        assert push(running, weights_of(folders[1]), 1).status_code == 404


def test_no_key_no_push(shared):
    answer = httpx2.post(f"{shared}/v1/weights?version=1", content=b"x", trust_env=False, verify=PLAIN)
    assert answer.status_code == 401


def test_no_answer_mixes_old_and_new_while_versions_are_pushed_under_load(server, folders):
    known = {"v" + str(n): by(weights_of(folders[n % 3]), folders[0]) for n in range(6)}
    known[score(server).json()["revision"]] = by(weights_of(folders[0]), folders[0])
    with concurrent.futures.ThreadPoolExecutor(4) as askers:
        answers = [askers.submit(score, server, 40) for _ in range(40)]
        for version in range(6):
            assert push(server, weights_of(folders[version % 3]), version).status_code == 200
        seen = {json.loads(one.result().text)["revision"] for one in answers}
        for one in answers:
            check_scored_by(one.result(), known[one.result().json()["revision"]], one.result().json()["revision"])
    assert len(seen) > 1


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
async def test_our_own_client_pushes_what_a_learner_publishes(server, folders, dtype):
    tensors = {name: tensor.numpy() for name, tensor in weights_of(folders[1]).items()}
    if dtype is np.uint16:  # the bits of bfloat16
        halves = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in tensors.items()}
        tensors = {name: half.view(torch.int16).numpy().view(np.uint16) for name, half in halves.items()}
        expected = {name: half.float() for name, half in halves.items()}
    else:
        expected = weights_of(folders[1])
    version, payload = pack(tensors, 7)
    async with aclosing(TeacherClient(open_endpoint(server, KEY, Calling(deadline_s=10.0, concurrency=1)))) as client:
        before = (await client.capabilities()).identity
        assert await client.push_weights(version, payload, ema_decay=0.0) == "v7"
        assert (await client.capabilities()).identity == replace(before, revision="v7")
        check_scored_by(score(server), by(expected, folders[0]), "v7")
        with pytest.raises(TeacherRefused, match="409"):
            await client.push_weights(version, payload, ema_decay=0.0)
