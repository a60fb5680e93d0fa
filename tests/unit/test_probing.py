"""Probing by URL and by run config: kinds recognised, students compared, APIs that write, and what is printed of it."""

from __future__ import annotations

import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.algebra.objective import Tier
from potstill.config import RunConfig
from potstill.errors import ConfigError, TeacherRefused
from potstill.methods import PRESETS
from potstill.probing.asking import Found, Wanted, as_json, of_run, of_url
from potstill.probing.comparison import compare
from potstill.probing.page import FAMILIES, served, served_lines
from potstill.probing.recognition import kind_of
from potstill.tokenization import fingerprint, load_tokenizer
from potstill.wire import Capabilities
from tests.endpoint_models import chat, vllm
from tests.endpoints import Said, endpoint, scripted
from tests.tiny_models import VOCABULARY, save_tiny_model
from tests.two_tokenizers import pieces


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `tiny`, `padded` (a wider head), `drifted` (another template) and `pieces` (another tokenizer)."""
    place = tmp_path_factory.mktemp("folders")
    save_tiny_model(place / "tiny", seed=0)
    save_tiny_model(place / "padded", seed=0, vocab_size=320)
    drifted = load_tokenizer(save_tiny_model(place / "drifted", seed=0))
    drifted.chat_template = drifted.chat_template.replace("assistant\n", "assistant\n\n")
    drifted.save_pretrained(place / "drifted")
    pieces().save_pretrained(place / "pieces")
    return place


def able_of(folder: Path, **claims: Any) -> Capabilities:
    facts = {"tier": Tier.IDS, "context_length": 64, "vocabulary": 259, "max_top_k": 8, "hidden_size": 0, "head_id": ""}
    limits = {"max_items": 100, "max_tokens": 10_000, "max_body_bytes": 2**20}
    reads = fingerprint(load_tokenizer(folder))
    return Capabilities(model="big", revision="r", tokenizer_fingerprint=reads, **(facts | limits | claims))


def config(folders: Path, teacher: dict[str, Any], **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "one",
            "method": "opd_sampled",
            "student": {"model": str(folders / "tiny")},
            "teacher": teacher,
            "data": {"kind": "jsonl", "path": "data.jsonl"},
            "rollout": {"prompts_per_step": 2, "max_prompt_tokens": 32, "sampling": {"max_new_tokens": 4}},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 3},
        }
        | changes
    )


async def found_at(url: str, wanted: Wanted) -> list[Found]:
    return await of_url(url, wanted, say=[].append)


async def found_in(run: RunConfig) -> list[Found]:
    return await of_run(run, say=[].append)


def printed(found: list[Found]) -> str:
    return "\n".join(line for one in found for line in one.lines())


# -------------------------------------------------------------------------------------------------------- students


def test_the_same_tokens_and_template_are_said_plainly(folders: Path):
    found = compare(able_of(folders / "tiny"), student=folders / "tiny", teacher=folders / "tiny")
    assert (found.same_tokens, found.problem) == (True, None)
    assert found.lines[0] == "the same tokenizer as the student's"
    assert "the same 65 ids" in found.lines[1]


def test_padding_rows_of_a_head_are_no_other_vocabulary(folders: Path):
    found = compare(able_of(folders / "tiny"), student=folders / "padded", teacher=folders / "tiny")
    assert (found.same_tokens, found.problem) == (True, None)
    assert "heads of 320 and 259 rows: fine" in found.lines[1]


def test_a_template_that_drifts_is_shown_at_its_first_id(folders: Path):
    found = compare(able_of(folders / "tiny"), student=folders / "tiny", teacher=folders / "drifted")
    assert found.same_tokens
    assert "chat templates differ from id 65 on: student nothing more, teacher [" in found.lines[-1]
    assert r"'\n'" in found.lines[-1]


def test_another_tokenizer_names_the_methods_that_align_text(folders: Path):
    found = compare(able_of(folders / "pieces"), student=folders / "tiny", teacher=folders / "pieces")
    assert (found.same_tokens, found.problem) == (False, None)
    assert "cross_tokenizer, alm, cross_tokenizer_hybrid with teacher.tokenizer" in found.lines[0]
    assert "different text" in found.lines[-1]
    alone = compare(able_of(folders / "pieces"), student=folders / "tiny", teacher=None)
    assert "--tokenizer" in alone.lines[-1]


def test_a_folder_of_another_model_and_a_vocabulary_that_is_too_small_are_refused(folders: Path):
    other = compare(able_of(folders / "tiny"), student=folders / "tiny", teacher=folders / "pieces")
    assert "does not hold the tokenizer of big" in other.problem
    small = compare(able_of(folders / "tiny", vocabulary=200), student=folders / "tiny", teacher=None)
    assert "scores ids below 200" in small.problem


def test_methods_are_served_by_tier_and_by_tokens():
    assert {"opd_sampled", "sft"} <= set(served(Tier.SAMPLED))
    assert not {"gkd", "opd"} & set(served(Tier.TOPK))
    assert "gkd" in served(Tier.FULL)
    across = served(Tier.FULL, same_tokens=False)
    assert {"cross_tokenizer", "alm", "cross_tokenizer_hybrid", "sft"} <= set(across)
    assert not {"opd", "opd_sampled", "gkd"} & set(across)
    assert {name for methods in FAMILIES.values() for name in methods} == set(PRESETS)
    lines = list(served_lines(served(Tier.FULL)))
    assert all(len(line) <= 110 for text in lines for line in text.splitlines())


# ----------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("routes", "kind"),
    [
        ({"/v1/capabilities": {}}, "server"),
        ({"/version": {"version": "0.32"}}, "vllm"),
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "vllm"}]}}, "vllm"),
        ({"/version": "1", "/v1/models": {"data": [{"id": "m", "owned_by": "x"}]}}, "openai"),
        ({}, "openai"),
    ],
)
async def test_a_kind_is_recognised_by_its_routes(routes: dict[str, Any], kind: str):
    def answer(path: str, asked: Any) -> Said:
        return (200, routes[path]) if path in routes else (404, {})

    with scripted(answer) as server:
        async with aclosing(endpoint(server.url)) as other:
            assert await kind_of(other) == kind


async def test_a_wrong_key_is_told_from_a_foreign_kind():
    with scripted(lambda path, asked: (401, {"message": "no"})) as server:
        async with aclosing(endpoint(server.url)) as other:
            with pytest.raises(TeacherRefused, match="401"):
                await kind_of(other)


async def test_a_vllm_server_is_probed_through_the_student_it_is_for(folders: Path):
    with scripted(vllm()) as server:
        found = await found_at(server.url, Wanted(model="big", student=folders / "tiny"))
    said, text = as_json(found), printed(found)
    assert (found[0].usable, said["kind"], said["tier"], said["problems"]) == (True, "vllm", "TOPK", [])
    assert (said["max_top_k"], said["context_length"]) == (5, 63)
    assert "gkd_topk" in said["methods"]
    assert "opd" not in said["methods"]
    assert "student     the same tokenizer" in text
    assert "tempers" in said["notes"][0]
    assert "serves" in text


async def test_a_teacher_is_refused_first_and_serves_nothing(folders: Path):
    with scripted(vllm(law=nearly_even)) as server:
        found = await found_at(server.url, Wanted(model="big", tokenizer=folders / "tiny"))
    text = printed(found)
    assert not found[0].usable
    assert text.startswith(f"refused     {server.url}: blankness")
    assert "serves" not in text


def nearly_even(prefix: tuple[int, ...]) -> np.ndarray:
    return -np.log(VOCABULARY) - 1e-6 * np.arange(VOCABULARY)  # ranks need some order


@pytest.mark.parametrize(
    ("wanted", "option"),
    [
        ({"kind": "openai"}, "--model"),
        ({"kind": "vllm", "model": "m", "tokenizer": None}, "--tokenizer"),
        ({"kind": "completions", "model": "m"}, "--context-length"),
        ({"kind": "server", "key_env": "NOT_SET_ANYWHERE"}, "--key-env"),
    ],
)
async def test_what_a_kind_needs_is_named(folders: Path, wanted: dict[str, Any], option: str):
    with pytest.raises(ConfigError, match=option):
        await found_at("http://127.0.0.1:9", Wanted(**({"tokenizer": folders / "tiny"} | wanted)))


# ------------------------------------------------------------------------------------------------------------ APIs


async def test_an_api_that_writes_serves_methods_that_need_no_scores():
    with scripted(chat()) as server:
        told: list[str] = []
        found = await of_url(server.url, Wanted(model="gpt"), say=told.append)
    said = as_json(found)
    assert "cost a few tokens" in told[0]
    assert (said["tier"], said["repeats"], said["echoes"], said["tokens_in"]) == ("TEXT", True, False, 17)
    assert {"sft", "gad"} <= set(said["methods"])
    assert "opd_sampled" not in said["methods"]
    assert [path for path, _ in server.asked if "completions" in path] == [
        *["/v1/chat/completions"] * 2,
        "/v1/completions",
    ]


async def test_an_api_that_changes_its_mind_and_one_that_echoes_are_told():
    with scripted(chat(echoes=True, answers=str)) as server:
        found = await found_at(server.url, Wanted(kind="openai", model="gpt"))
    text = printed(found)
    assert "not the same" in text
    assert 'kind "completions"' in text


async def test_an_api_that_does_not_answer_is_refused_and_no_key_is_shown(monkeypatch):
    monkeypatch.setenv("SECRET", "sk-very-secret")
    with scripted(lambda path, asked: (400, {"error": {"message": "key sk-very-secret is odd"}})) as server:
        found = await found_at(server.url, Wanted(kind="openai", model="gpt", key_env="SECRET"))
    assert not found[0].usable
    assert "refused" in printed(found)
    assert "sk-very-secret" not in printed(found) + json.dumps(as_json(found))


# ------------------------------------------------------------------------------------------------------------ runs


async def test_a_run_config_is_probed_for_its_own_method(folders: Path):
    with scripted(vllm()) as server:
        teacher = {"kind": "vllm", "url": server.url, "model": "big"}
        fits = await found_in(config(folders, teacher))
        wide = await found_in(config(folders, teacher, method="opd"))
    assert fits[0].usable
    assert not wide[0].usable
    assert printed(wide).startswith("refused     method 'opd' needs a teacher of tier IDS, and this one gives TOPK")


async def test_a_run_that_brings_its_own_teacher_has_nobody_to_probe(folders: Path):
    with pytest.raises(ConfigError, match="nobody to probe"):
        await found_in(config(folders, {"kind": "server", "model": str(folders / "tiny")}))
