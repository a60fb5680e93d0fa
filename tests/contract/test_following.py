"""A teacher that follows the student, and pushes that fail or seem to: a worker's parts, a real server over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import StaleWeights, TeacherUnavailable
from potstill.teachers.opening import TEACHER, Access
from potstill.weights import pack
from rollout_worker.opening import Opened, open_worker
from teacher_server.app import create_app
from teacher_server.batching import ScoringQueue
from teacher_server.engine import ScoringTeacher
from teacher_server.limits import Limits
from teacher_server.transformers_backbone import TransformersBackbone
from teacher_server.weights_route import Versions
from tests.builders_teacher import KEY
from tests.served import serving
from tests.teacher_tables import offering
from tests.tiny_models import save_tiny_model

DECAY = 0.5
ALWAYS = 1000


@dataclass
class Spoilt:
    """The app behind a proxy that spoils the next pushes. "refused" ones do not arrive; "lost" ones have no answer."""

    app: ASGIApp
    fault: str = ""
    times: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not (scope["type"] == "http" and scope["path"] == "/v1/weights" and self.times):
            await self.app(scope, receive, send)
            return
        self.times -= 1
        if self.fault == "lost":
            await self.app(scope, receive, self._lose)
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def _lose(self, message: Message) -> None:
        pass


class Teacher(ScoringTeacher):
    """Keeps what it was given, to be compared."""

    held: Mapping[str, Tensor]

    def load_weights(self, weights: Mapping[str, Tensor], *, revision: str) -> None:
        super().load_weights(weights, revision=revision)
        self.held = weights


@dataclass
class Following:
    """A worker, and the server that follows its student."""

    folder: Path
    teacher: Teacher
    spoilt: Spoilt
    worker: Opened

    def spoil(self, fault: str, times: int) -> None:
        self.spoilt.fault, self.spoilt.times = fault, times

    async def load(self, version: int) -> int:
        arrays = {name: tensor.numpy() for name, tensor in self.student(version).items()}
        return await self.worker.load_weights(*pack(arrays, version))

    def student(self, version: int) -> dict[str, Tensor]:
        start = load_file(self.folder / "model.safetensors")
        return {name: tensor + 0.01 * version for name, tensor in start.items()}

    def check_is_mean_of(self, *versions: int) -> None:
        """Whether the teacher has taken these versions of the student, each once, and whether the worker knows."""
        assert self.teacher.identity.revision == f"v{versions[-1]}"
        wanted = self.student(0)
        for version in versions:
            wanted = {n: DECAY * wanted[n] + (1 - DECAY) * tensor for n, tensor in self.student(version).items()}
        for name, tensor in self.teacher.held.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def config_of(folder: Path, url: str) -> RunConfig:
    return parse(
        {
            "name": "following",
            "runs": str(folder / "runs"),
            "method": "opd_sampled",
            "student": {"model": str(folder)},
            "teacher": {
                "kind": "server",
                "url": url,
                "secret_ref": "env:UNUSED",
                "follows": "student",
                "ema_decay": DECAY,
                "deadline_s": 1,
            },
            "data": {"kind": "jsonl", "path": str(folder / "data.jsonl")},
            "rollout": {"prompts_per_step": 1, "max_prompt_tokens": 64, "sampling": {"max_new_tokens": 4}},
            "optim": {"lr": 1e-3},
            "loop": {"steps": 3},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny_model(tmp_path_factory.mktemp("following") / "tiny", seed=3, layers=1)
    (made / "data.jsonl").write_text('{"prompt": "12 + 9 = ?", "answer": "21"}\n')
    return made


@pytest.fixture
async def following(folder: Path) -> AsyncIterator[Following]:
    teacher = Teacher(TransformersBackbone(folder, dtype="float32"), folder, name="tiny")
    queue = ScoringQueue(teacher.score, capacity=10_000, batch_tokens=100, window_s=0.0)
    limits = Limits(max_tokens=1000, queue_tokens=10_000)
    spoilt = Spoilt(create_app(teacher, queue, limits, KEY, Versions(teacher, folder)))
    with serving(spoilt) as url:
        accesses = {TEACHER: Access(url=url, key=KEY)}
        worker = await open_worker(config_of(folder, url), accesses, offering(teacher.identity), 0)
        yield Following(folder, teacher, spoilt, worker)
        await worker.close()


async def test_a_push_that_fails_is_made_up_for_when_the_version_is_loaded_again(following: Following):
    following.spoil("refused", ALWAYS)
    with pytest.raises(TeacherUnavailable):
        await following.load(1)
    assert following.worker.student.version == 1
    following.spoil("refused", 0)
    assert await following.load(1) == 1
    following.check_is_mean_of(1)
    assert await following.load(2) == 2
    following.check_is_mean_of(1, 2)


async def test_a_push_that_fails_keeps_no_later_version_from_the_teacher(following: Following):
    following.spoil("refused", ALWAYS)
    with pytest.raises(TeacherUnavailable):
        await following.load(1)
    following.spoil("refused", 0)
    assert await following.load(2) == 2
    following.check_is_mean_of(2)


@pytest.mark.parametrize("times", [1, ALWAYS], ids=["once", "until the deadline"])
async def test_a_push_whose_answer_is_lost_is_taken_once(following: Following, times: int):
    following.spoil("lost", times)
    if times == ALWAYS:
        with pytest.raises(TeacherUnavailable):
            await following.load(1)
        following.spoil("lost", 0)
    assert await following.load(1) == 1
    following.check_is_mean_of(1)


async def test_weights_that_teacher_and_student_have_are_refused(following: Following):
    await following.load(2)
    for version in (2, 1):
        with pytest.raises(StaleWeights):
            await following.load(version)
    following.check_is_mean_of(2)
