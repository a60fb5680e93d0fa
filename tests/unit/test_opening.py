"""From a [teacher] table to whoever scores or writes for it; secrets come from where they are kept and go nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from potstill.config_teachers import Calling
from potstill.errors import ConfigError, TeacherRefused
from potstill.teachers.echoing import EchoScorer
from potstill.teachers.opening import Access, called, open_endpoint, open_scorer, secret
from potstill.teachers.replicas import Replicas
from potstill.teachers.retokenised import RetokenisedScorer
from potstill.teachers.server import TeacherClient
from potstill.teachers.several import Several
from potstill.teachers.vllm import VllmScorer
from potstill.tokenization import load_tokenizer
from potstill.types import Message
from tests.chat_server import chat_server, opened
from tests.teacher_tables import (
    ADVISED,
    COMPLETIONS,
    LOCAL,
    NONE,
    OPENAI,
    SELF,
    SERVED_HERE,
    SERVER,
    SEVERAL,
    URL,
    VLLM,
    teacher_of,
)
from tests.tiny_models import save_tiny_model
from tests.two_tokenizers import byte_level

CANARY = "sk-canary-4711"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=0))


async def scorer_of(table: dict[str, Any], student: PreTrainedTokenizerBase, *, key: str | None = CANARY) -> Any:
    teacher = teacher_of(table)
    accesses = {name: Access(url=one.url or URL, key=key) for name, one, _ in called(teacher)}
    scorer = open_scorer(teacher, accesses, student=student)
    await scorer.aclose()
    return scorer


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        (SERVER, TeacherClient),
        (SERVED_HERE, TeacherClient),
        ({**SERVER, "replicas": ["http://127.0.0.1:2"]}, Replicas),
        (VLLM, VllmScorer),
        (COMPLETIONS, EchoScorer),
        (SEVERAL, Several),
    ],
)
async def test_a_kind_that_scores_opens_its_scorer(table: Any, kind: type, student: PreTrainedTokenizerBase):
    assert type(await scorer_of(table, student)) is kind


@pytest.mark.parametrize("table", [SERVER, VLLM, COMPLETIONS])
async def test_a_teacher_of_other_tokens_is_put_into_the_students(
    table: Any, student: PreTrainedTokenizerBase, tmp_path: Path
):
    byte_level(262).save_pretrained(tmp_path)
    assert type(await scorer_of({**table, "tokenizer": str(tmp_path)}, student)) is RetokenisedScorer


@pytest.mark.parametrize("table", [OPENAI, ADVISED, LOCAL, NONE])
async def test_a_kind_that_scores_nothing_over_http_is_refused_by_name(table: Any, student: PreTrainedTokenizerBase):
    with pytest.raises(ConfigError, match=f"teacher.kind '{table['kind']}'"):
        await scorer_of(table, student)


@pytest.mark.parametrize(
    ("table", "found"),
    [
        (SERVER, [("teacher", "teacher")]),
        (OPENAI, [("teacher", "teacher")]),
        (ADVISED, [("advisor", "teacher.advisor")]),
        (SEVERAL, [("maths", "teacher.members.maths.teacher"), ("rest", "teacher.members.rest.teacher")]),
        (LOCAL, []),
        (SELF, []),
        (NONE, []),
    ],
)
def test_every_endpoint_of_a_table_has_a_name_and_a_place(table: Any, found: list[tuple[str, str]]):
    assert [(name, place) for name, _, place in called(teacher_of(table))] == found


def test_a_secret_is_read_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEACHER_KEY", CANARY)
    (tmp_path / "key").write_text(f"{CANARY}\n")
    assert secret("env:TEACHER_KEY", "teacher.secret_ref") == CANARY
    assert secret(f"file:{tmp_path / 'key'}", "teacher.secret_ref") == CANARY


@pytest.mark.parametrize("reference", ["env:NO_SUCH_KEY", "file:{folder}/missing", "file:{folder}/binary"])
def test_a_secret_that_is_not_there_names_the_setting_and_shows_no_value(reference: str, tmp_path: Path):
    (tmp_path / "binary").write_bytes(CANARY.encode() + b"\xff")
    with pytest.raises(ConfigError, match=r"^teacher\.advisor\.secret_ref: ") as caught:
        secret(reference.format(folder=tmp_path), "teacher.advisor.secret_ref")
    assert CANARY not in repr(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("key", ["", f"{CANARY}\nX-Other: 1"])
async def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key: str):
    with pytest.raises(ConfigError, match="authorization") as caught:
        open_endpoint(URL, key, Calling())
    assert CANARY not in str(caught.value)


def test_a_key_is_not_shown_by_what_carries_it():
    access = Access(url=URL, key=CANARY)
    assert CANARY not in repr(access)


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        (None, "http://example.com"),
        (None, "http://8.8.8.8"),
        ("", "http://127.0.0.1:8000"),
        ("10.1.0.0/16", "http://192.168.0.7:8000"),
    ],
)
async def test_an_address_that_may_not_be_called_names_the_setting_of_those_that_may(
    allowed: str | None, url: str, student: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("POTSTILL_TEACHERS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("POTSTILL_TEACHERS", allowed)
    if url == "http://example.com":
        monkeypatch.setenv("POTSTILL_TEACHERS", "")
    with pytest.raises(ConfigError, match="POTSTILL_TEACHERS"):
        await scorer_of({**VLLM, "url": url}, student)


async def test_an_address_that_is_listed_may_be_called(student: PreTrainedTokenizerBase, monkeypatch: Any):
    monkeypatch.setenv("POTSTILL_TEACHERS", "10.1.0.0/16, gpu-box")
    for url in ("http://10.1.2.3:8000", "http://gpu-box:8000"):
        await scorer_of({**VLLM, "url": url}, student)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/?key=1", "http://me:secret@127.0.0.1:1", "ftp://127.0.0.1", "x"])
async def test_what_is_no_base_url_is_refused(url: str, student: PreTrainedTokenizerBase):
    with pytest.raises(ConfigError) as caught:
        await scorer_of({**VLLM, "url": url}, student)
    assert "secret" not in str(caught.value)


async def test_a_key_that_a_failing_api_repeats_is_in_no_error(tmp_path: Path):
    said = {"error": {"message": "bad key sesame, Bearer sesame"}}
    with chat_server(lambda text: (401, said)) as server:
        async with opened(server, tmp_path) as box:
            with pytest.raises(TeacherRefused, match=r"401: bad key \*\*\*") as caught:
                await box.ask([Message(role="user", content="12 + 9?")])
    assert "sesame" not in str(caught.value)
