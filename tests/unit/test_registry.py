"""Registered teachers: what may be registered, and what a run that borrows one gets and may say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.service.catalog import Catalog
from orchestrator.service.registry import KINDS
from potstill.errors import ConfigError, ServiceError
from tests import catalogs
from tests.catalogs import allowed, body, once, principal, watched

ANNA, BEN = principal("anna"), principal("ben")
SERVER = {"kind": "server", "url": "http://127.0.0.1:8001", "secret_ref": "file:key"}
OPENAI = {"kind": "openai", "url": "https://api.example.com", "model": "big", "secret_ref": "env:POTSTILL_SECRET_API"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return catalogs.furnish(tmp_path)


@pytest.fixture
def catalog(folder: Path) -> Iterator[Catalog]:
    with catalogs.catalog(folder) as opened:
        yield opened


def register(catalog: Catalog, name: str, **table: Any) -> None:
    catalog._store.teachers.add(name, catalog.registry.checked(table), once())


def borrowing(name: Any = "api", **more: Any) -> dict[str, Any]:
    return {"kind": "registered", "name": name, **more}


def test_a_registered_teacher_lends_its_url_and_its_secret(catalog: Catalog, folder: Path) -> None:
    register(catalog, "big", **SERVER, tokenizer="small")
    teacher = catalog.resolve(body(teacher=borrowing("big", privileged_template="{prompt} {answer}")), ANNA).teacher
    assert (teacher.url, teacher.secret_ref) == (SERVER["url"], f"file:{folder / 'secrets/key'}")
    assert teacher.tokenizer == str(folder / "models/small")
    assert teacher.privileged_template == "{prompt} {answer}"


def test_answers_are_kept_for_each_owner_below_the_runs(catalog: Catalog, folder: Path) -> None:
    register(catalog, "api", **OPENAI)
    anna, again, ben = (
        catalog.resolve(body(teacher=borrowing(instruction="Write: {prompt}")), who).teacher.answers
        for who in (ANNA, principal("anna"), BEN)
    )
    assert anna == again != ben
    assert Path(anna).parent == Path(ben).parent == folder / "runs/.answers"
    strange = catalog.resolve(body(teacher=borrowing()), principal("../../x\0\n")).teacher.answers
    assert re.fullmatch(r"[0-9a-f]{32}\.sqlite", Path(strange).name)


def test_members_and_advisors_are_borrowed_alike(catalog: Catalog) -> None:
    register(catalog, "big", **SERVER)
    register(catalog, "api", **OPENAI)
    members = {
        "a": {"teacher": borrowing("big"), "domains": ["x"]},
        "b": {"teacher": {"kind": "server", "model": "small"}},
    }
    teacher = catalog.resolve(body(teacher={"kind": "several", "members": members}), ANNA).teacher
    assert teacher.members["a"].teacher.url == SERVER["url"]
    advised = {
        "kind": "self",
        "privileged_template": "{advice}",
        "advisor": borrowing("api", instruction="Help: {prompt}"),
    }
    advisor = catalog.resolve(body(teacher=advised), ANNA).teacher.advisor
    assert (advisor.url, advisor.instruction) == (OPENAI["url"], "Help: {prompt}")


@pytest.mark.parametrize(
    ("borrowed", "said"),
    [
        (borrowing("bigg"), "teacher.name: no teacher 'bigg' is registered; did you mean 'big'?"),
        (borrowing("../big"), "teacher.name: no teacher '../big' is registered"),
        (borrowing("BIG"), "teacher.name: no teacher 'BIG' is registered"),
        (borrowing(None), "teacher.name: no teacher 'None' is registered"),
        (borrowing({"x": 1}), "teacher.name: no teacher"),
        (borrowing("big", url="http://10.0.0.1"), "teacher.url: is not the run's to say of a registered teacher"),
        (borrowing("big", secret_ref="env:HOME"), "teacher.secret_ref: is not the run's"),
        (borrowing("big", replicas=["http://10.0.0.1"]), "teacher.replicas: is not the run's"),
        (borrowing("big", follows="student"), "teacher.follows: is not the run's"),
        (borrowing("api", answers="/etc/x"), "teacher.answers: is not the run's"),
        (borrowing("api", budget=1e9), "teacher.budget: is not the run's"),
        (borrowing("api", privileged_template="x"), "teacher.privileged_template: is not the run's"),
        ({"kind": "self", "privileged_template": "{advice}", "advisor": borrowing("big")}, "teacher.advisor.name: big"),
    ],
)  # fmt: skip
def test_what_a_run_may_not_say_of_a_registered_teacher(catalog: Catalog, borrowed: dict[str, Any], said: str) -> None:
    register(catalog, "big", **SERVER)
    register(catalog, "api", **OPENAI)
    assert catalogs.lines(catalog, body(teacher=borrowed), ANNA)[0].startswith(said)


def test_a_secret_that_has_gone_is_told_without_its_place(catalog: Catalog, folder: Path) -> None:
    register(catalog, "big", **SERVER)
    (folder / "secrets/key").unlink()
    with pytest.raises(ServiceError) as caught:
        catalog.resolve(body(teacher=borrowing("big")), ANNA)
    assert caught.value.status == 503
    assert str(folder) not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"secret_ref": "sk-live-hunter2"}, ["teacher.secret_ref"]),
        ({"secret_ref": "env:HOME"}, ["teacher.secret_ref"]),
        ({"secret_ref": "env:POTSTILL_RUN_TOKEN"}, ["teacher.secret_ref"]),
        ({"secret_ref": "file:/etc/passwd"}, ["teacher.secret_ref"]),
        ({"secret_ref": "file:../outside/secret.jsonl"}, ["teacher.secret_ref"]),
        ({"secret_ref": "file:absent"}, ["teacher.secret_ref"]),
        ({"secret_ref": "file:out"}, ["teacher.secret_ref"]),
        ({"secret_ref": "file:key\n"}, ["teacher.secret_ref"]),
        ({"url": "http://10.0.0.1:8001"}, ["teacher.url"]),
        ({"url": "http://169.254.169.254"}, ["teacher.url"]),
        ({"url": "http://me:hunter2@127.0.0.1:8001"}, ["teacher.url"]),
        ({"replicas": ["http://127.0.0.1:2", "http://10.0.0.1"]}, ["teacher.replicas.1"]),
        ({"tokenizer": "/etc"}, ["teacher.tokenizer"]),
        ({"tokenizer": "out"}, ["teacher.tokenizer"]),
        ({"head": "../outside/secret"}, ["teacher.head"]),
        ({"follows": "student"}, ["teacher.follows"]),
        ({"url": None, "secret_ref": None, "model": "small"}, ["teacher.model"]),
        ({"api_key": "hunter2"}, ["teacher.api_key"]),
        ({"kind": "self", "privileged_template": "x"}, ["teacher.kind"]),
        ({"kind": "registered", "name": "big"}, ["teacher.kind"]),
        ({"kind": "none"}, ["teacher.kind"]),
        ({"kind": None}, ["teacher.kind"]),
        ({"kind": "openai", "model": "m", "answers": "runs/x.sqlite"}, ["teacher.answers"]),
        ({"deadline_s": -1}, ["teacher.deadline_s"]),
    ],
)
def test_what_may_not_be_registered(catalog: Catalog, folder: Path, changes: dict[str, Any], keys: list[str]) -> None:
    (folder / "secrets/out").symlink_to(folder / "outside/secret.jsonl")
    table = {key: value for key, value in {**SERVER, **changes}.items() if value is not None}
    with watched() as opened, pytest.raises(ConfigError) as caught:
        catalog.registry.checked(table)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == keys
    assert "hunter2" not in str(caught.value)
    assert str(folder) not in str(caught.value)
    assert [path for path in opened if not path.startswith(allowed(folder))] == []


def test_every_kind_that_is_called_can_be_registered(catalog: Catalog) -> None:
    url, model = "https://x.example", "m"
    tables = {
        "server": SERVER,
        "vllm": {"url": url, "model": model, "tokenizer": "small"},
        "completions": {"url": url, "model": model, "context_length": 64},
        "openai": OPENAI,
    }
    assert tables.keys() == KINDS.keys()
    for kind, table in tables.items():
        assert catalog.registry.checked({"kind": kind, **table}) == {"kind": kind, **table}
