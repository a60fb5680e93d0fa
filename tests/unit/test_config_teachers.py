"""The [teacher] table: every kind from its smallest table, and each contradiction refused with the way out."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from potstill.config_teachers import TeacherConfig
from tests.teacher_tables import (
    ADVISED,
    COMPLETIONS,
    EVERY,
    LOCAL,
    MEMBERS,
    OPENAI,
    SELF,
    SERVED_HERE,
    SERVER,
    SEVERAL,
    URL,
    VLLM,
    WRITER,
    teacher_of,
)


def without(table: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def with_member(**changes: Any) -> dict[str, Any]:
    """Several teachers, the first of which is changed."""
    return {**SEVERAL, "members": {**MEMBERS, "maths": {**MEMBERS["maths"], "teacher": {**SERVER, **changes}}}}


def test_every_kind_is_made_of_its_smallest_table_and_comes_back_from_json():
    kinds = {get_args(model.model_fields["kind"].annotation)[0] for model in get_args(get_args(TeacherConfig)[0])}
    assert {table["kind"] for table in EVERY} == kinds
    for table in EVERY:
        made = teacher_of(table)
        assert teacher_of(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("table", "key"),
    [
        *((VLLM, key) for key in ("url", "model")),
        *((COMPLETIONS, key) for key in ("url", "model", "context_length")),
        *((OPENAI, key) for key in ("url", "model")),
        (SELF, "privileged_template"),
        (LOCAL, "models"),
        (SEVERAL, "members"),
    ],
)
def test_what_a_kind_cannot_be_without_is_named(table: dict[str, Any], key: str):
    with pytest.raises(ValidationError, match=rf"{table['kind']}\.{key}\n  Field required"):
        teacher_of(without(table, key))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"kind": "server"}, "exactly one of teacher.url"),
        ({**SERVER, "model": "m"}, "exactly one of teacher.url"),
        (without(SERVER, "secret_ref"), "teacher.url goes with teacher.secret_ref"),
        ({**SERVED_HERE, "secret_ref": "env:KEY"}, "teacher.url goes with teacher.secret_ref"),
        ({**SERVED_HERE, "replicas": [URL]}, "teacher.replicas stand beside teacher.url"),
        ({**SELF, "privileged_template": "{advice}"}, "{advice} in teacher.privileged_template goes with teacher.adv"),
        ({**SELF, "advisor": WRITER}, "{advice} in teacher.privileged_template goes with teacher.advisor"),
        ({**OPENAI, "budget": 1.0}, "give price_in and price_out"),
        ({**ADVISED, "advisor": {**WRITER, "budget": 1.0}}, "give price_in and price_out"),
        ({**LOCAL, "models": []}, "at least 1 item"),
        ({**SEVERAL, "members": {"maths": MEMBERS["maths"]}}, "at least 2 items"),
        (with_member(privileged_template="{answer}"), "privileged_template and fade_steps stand at"),
        (with_member(fade_steps=3), "privileged_template and fade_steps stand at"),
        ({**SEVERAL, "members": {"a": {"teacher": {**VLLM, "tokenizer": "t"}}, "b": {"teacher": VLLM}}}, "domains of"),
        ({**SEVERAL, "members": {"a": {"teacher": OPENAI}, "b": {"teacher": VLLM}}}, "'openai'"),
    ],
)
def test_a_contradiction_is_refused_with_the_way_out(table: dict[str, Any], says: str):
    with pytest.raises(ValidationError) as caught:
        teacher_of(table)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "", "Maths", "a" * 64])
def test_a_members_name_is_one_that_a_log_can_be_called_by(name: str):
    with pytest.raises(ValidationError, match="String should match pattern"):
        teacher_of({**SEVERAL, "members": {**MEMBERS, name: {"teacher": VLLM}}})


@pytest.mark.parametrize("table", [SERVER, VLLM, COMPLETIONS, OPENAI])
def test_a_key_itself_is_refused(table: dict[str, Any]):
    with pytest.raises(ValidationError, match="secret_ref"):
        teacher_of({**table, "secret_ref": "sk-12345"})


@pytest.mark.parametrize(
    ("table", "setting", "value"),
    [
        (SERVER, "deadline_s", 0),
        (SERVER, "concurrency", 0),
        (OPENAI, "temperature", -0.1),
        (OPENAI, "max_tokens", 0),
        (OPENAI, "price_in", -1),
        ({**OPENAI, "price_in": 1}, "budget", 0),
        ({**OPENAI, "price_in": 1}, "budget", float("inf")),
        (SELF, "ema_decay", 1.0),
        (SELF, "trust", 1.0),
        (SELF, "fade_steps", 0),
        (OPENAI, "ranks", "yes"),
    ],
)
def test_a_number_that_means_nothing_is_named(table: dict[str, Any], setting: str, value: Any):
    with pytest.raises(ValidationError, match=rf"{table['kind']}\.{setting}\n"):
        teacher_of({**table, setting: value})
