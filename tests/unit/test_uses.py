"""What an unfinished run names stays, and what is gone is named by no new run: also when both happen at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.service.principals import Limits
from orchestrator.service.runs import State
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.files import File, new_file_id
from orchestrator.service.store.runs import NewRun
from orchestrator.service.store.schema import FILES, TEACHERS
from orchestrator.service.store.uses import named_in
from potstill.errors import ServiceError
from tests.catalogs import once
from tests.databases import server, url  # noqa: F401  fixtures
from tests.service_configs import submitted

FILE = "file-" + "0" * 28
BORROWED = {"kind": "registered", "name": "big"}


@pytest.fixture
def store(url: str) -> Iterator[Store]:  # noqa: F811
    opened = Store(Database(url))
    yield opened
    opened.close()


def put_file(store: Store) -> str:
    file = File(
        id=new_file_id("0" * 64), owner="anna", key_id="k", filename="x", purpose="prompts", format="jsonl",
        bytes=1, sha256="0" * 64, rows=1, columns=["prompt"], created_at=1.0,
    )  # fmt: skip
    return store.files.add(file, once(), Limits())[0].id


def run_that_names(store: Store, name: str, **places: Any) -> None:
    body = submitted(name=name) | places
    store.runs.create(NewRun(id=name, submitted=body, config=body, owner="anna"), once("/v1/runs"))


def code_of(call: Any, *arguments: Any, **named: Any) -> str | None:
    """Of the refusal; None when there was none."""
    try:
        call(*arguments, **named)
    except ServiceError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"data": {"kind": "jsonl", "path": FILE}}, {(FILES, FILE)}),
        ({"data": {"kind": "jsonl", "path": "maths.jsonl"}, "name": FILE}, set()),
        ({"teacher": BORROWED}, {(TEACHERS, "big")}),
        ({"teacher": {"kind": "self", "advisor": {**BORROWED, "name": "api"}}}, {(TEACHERS, "api")}),
        ({"teacher": {"kind": "several", "members": {"a": {"teacher": BORROWED}}}}, {(TEACHERS, "big")}),
        ({"metadata": BORROWED, "teacher": {"kind": "none"}}, set()),
        ({"data": None, "teacher": None}, set()),
        ({"data": {"path": 3}, "teacher": {"kind": "registered", "name": 3}}, set()),
        ({}, set()),
    ],
)
def test_what_a_config_names_is_found_where_names_stand(body: dict[str, Any], named: set[Any]) -> None:
    assert set(named_in(body)) == named


def test_what_an_unfinished_run_names_is_not_deleted(store: Store) -> None:
    file = put_file(store)
    store.teachers.add("big", {"kind": "openai"}, once())
    run_that_names(store, "one", data={"kind": "jsonl", "path": file}, teacher=BORROWED)
    for state in (State.STARTING, State.RUNNING, State.PAUSING, State.PAUSED, State.CANCELLING):
        assert code_of(store.files.delete, file, None) == code_of(store.teachers.delete, "big") == "in_use"
        store.runs.move("one", state, "")
    store.runs.move("one", State.SUCCEEDED, "")
    assert code_of(store.files.delete, file, None) is code_of(store.teachers.delete, "big") is None


def test_what_is_gone_is_named_by_no_new_run(store: Store) -> None:
    for place in ({"data": {"kind": "jsonl", "path": FILE}}, {"teacher": BORROWED}):
        assert code_of(run_that_names, store, "late", **place) == "deleted"
    assert not store.runs.exists("late")


def test_a_run_and_the_deletion_of_what_it_names_never_both_succeed(store: Store) -> None:
    with ThreadPoolExecutor(2) as pool:
        for number in range(20):
            file = put_file(store)
            made = pool.submit(code_of, run_that_names, store, f"r{number}", data={"kind": "jsonl", "path": file})
            gone = pool.submit(code_of, store.files.delete, file, None)
            assert {made.result(), gone.result()} in ({None, "in_use"}, {None, "deleted"})
            assert store.files.exists(file) == store.runs.exists(f"r{number}")
