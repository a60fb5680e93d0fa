"""Which teachers a run starts, calls and meets, and which it refuses before anything else is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.launch import ACTOR_ENV
from orchestrator.teachers import teachers
from potstill.algebra.objective import Tier
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import ConfigError, PlanError, TeacherRefused, TeacherUnavailable
from potstill.tokenization import fingerprint
from potstill.types import TeacherIdentity
from tests.endpoints import Said, scripted
from tests.teacher_tables import ADVISED, LOCAL, NONE, OPENAI, SELF, SERVED_HERE, SEVERAL, VLLM, offering
from tests.tiny_models import save_tiny_model, tiny_tokenizer

KEY = "sk-canary-4711"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


def make_config(model: Path, method: str, teacher: dict[str, Any], *changes: str) -> RunConfig:
    return parse(
        {
            "name": "one",
            "method": method,
            "student": {"model": str(model)},
            "teacher": teacher,
            "data": {"kind": "jsonl", "path": "data.jsonl"},
            "rollout": {"prompts_per_step": 3, "max_prompt_tokens": 32, "sampling": {"max_new_tokens": 5}},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 7},
        },
        changes,
    )


def able(**changes: Any) -> Said:
    """What a teacher server says of itself."""
    identity = TeacherIdentity(name="m", revision="r", tokenizer_fingerprint=fingerprint(tiny_tokenizer()))
    return 200, offering(identity, **changes).model_dump()


@pytest.mark.parametrize(
    ("method", "teacher"),
    [("sft", NONE), ("gkd", LOCAL), ("opsd", SELF), ("sft", SERVED_HERE), ("sft", VLLM), ("sft", SEVERAL)],
)
async def test_a_run_that_nobody_outside_it_scores_for_calls_nobody(
    method: str, teacher: dict[str, Any], model: Path, tmp_path: Path
):
    async with teachers(make_config(model, method, teacher), tmp_path, ACTOR_ENV) as faculty:
        assert (faculty.accesses, faculty.met, faculty.processes) == ({}, None, ())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "name", "teacher"),
    [
        ("sft", "teacher", lambda url, key: {**OPENAI, "url": url, "secret_ref": key}),
        ("opsd", "advisor", lambda url, key: {**ADVISED, "advisor": {"url": url, "model": "m", "secret_ref": key}}),
    ],
)
async def test_whoever_only_writes_is_given_a_key_and_not_asked(
    method: str, name: str, teacher: Any, model: Path, tmp_path: Path
):
    (tmp_path / "key").write_text(KEY)
    with scripted(lambda path, asked: (500, {})) as server:
        table = teacher(server.url, f"file:{tmp_path / 'key'}")
        async with teachers(make_config(model, method, table), tmp_path, ACTOR_ENV) as faculty:
            (access,) = faculty.accesses.values()
            assert list(faculty.accesses) == [name]
            assert (access.url, access.key, faculty.met) == (server.url, KEY, None)
            assert KEY not in repr(faculty)
    assert server.asked == []


async def test_a_key_that_is_not_there_names_its_place(model: Path, tmp_path: Path):
    advisor = {"url": "http://127.0.0.1:1", "model": "m", "secret_ref": f"file:{tmp_path}/missing"}
    with pytest.raises(ConfigError, match=r"^teacher\.advisor\.secret_ref: "):
        async with teachers(make_config(model, "opsd", {**ADVISED, "advisor": advisor}), tmp_path, ACTOR_ENV):
            raise AssertionError("it was opened")


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        (able(tier=Tier.SAMPLED), PlanError, r"tier IDS, m offers SAMPLED; nearest that it can serve: \w+"),
        (able(context_length=20), PlanError, "m reads 20 tokens: lower rollout.max_prompt_tokens 32"),
        (able(max_top_k=4), PlanError, "m .* at most 4"),
        ((401, {"error": {"message": "no such key"}}), TeacherRefused, "401: no such key"),
        ((200, {"hello": "world"}), TeacherRefused, "is not a potstill teacher server of this version"),
        ((503, {"error": {"message": "loading"}}), TeacherUnavailable, "503: loading"),
    ],
)
async def test_a_teacher_that_cannot_serve_the_run_is_refused_when_it_is_met(
    said: Said, error: type[Exception], message: str, model: Path, tmp_path: Path
):
    (tmp_path / "key").write_text(KEY)
    with scripted(lambda path, asked: said) as server:
        table = {"kind": "server", "url": server.url, "secret_ref": f"file:{tmp_path / 'key'}", "deadline_s": 3.0}
        with pytest.raises(error, match=message) as caught:
            async with teachers(make_config(model, "opd", table), tmp_path, ACTOR_ENV):
                raise AssertionError("it was opened")
    assert KEY not in str(caught.value)
    assert {path for path, _ in server.asked} == {"/v1/capabilities"}


async def test_a_server_that_the_run_starts_is_met_and_ends_with_it(model: Path, tmp_path: Path):
    table = {"kind": "server", "model": str(model)}
    async with teachers(make_config(model, "opd", table), tmp_path, ACTOR_ENV) as faculty:
        (child,) = faculty.processes
        assert faculty.met is not None
        assert faculty.met.tokenizer_fingerprint == fingerprint(tiny_tokenizer())
        assert child.process.returncode is None
        assert faculty.accesses["teacher"].key not in (tmp_path / "teacher.log").read_text()
    assert child.process.returncode is not None
