"""Registered teachers over HTTP: registered, shown to whom, probed, kept while a run needs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.service.principals import Scope
from orchestrator.service.runs import State
from tests import endpoint_models
from tests.builders_teacher import KEY, teacher_server
from tests.endpoints import scripted
from tests.launchers import AwayLauncher
from tests.registering import error_of, nobody, register, registered, score, server_at
from tests.service_configs import submitted
from tests.services import Service, serving
from tests.talking import talking
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("teachers")
    save_tiny_model(folder / "models/tiny", seed=3)
    with serving(folder, lambda _url: AwayLauncher()) as running:
        (folder / "secrets/sesame").write_text(KEY)
        yield running


@pytest.fixture(scope="module")
def served(service: Service) -> Iterator[str]:
    """The URL of a real teacher server, which is registered as `real`."""
    with teacher_server(service.folder / "models/tiny", "--max-items", "4") as process:
        table = {"kind": "server", "url": process.url, "secret_ref": "file:sesame", "deadline_s": 30}
        assert register(service, "real", table).status_code == 201
        yield process.url


# Registered


def test_a_teacher_is_registered_shown_changed_and_removed(service: Service) -> None:
    table = {"kind": "vllm", "url": "http://127.0.0.1:8000", "model": "big", "secret_ref": "file:sesame"}
    response = register(service, "mine", table)
    made = response.json()
    assert (response.status_code, response.headers["location"]) == (201, "/v1/teachers/mine")
    assert (made["id"], made["object"], made["teacher"], made["probe"]) == ("mine", "teacher", table, None)
    assert error_of(register(service, "mine", table)) == (409, "name_taken")

    seen = service.http.get("/v1/teachers/mine")
    assert seen.json() == made
    assert "mine" in [one["id"] for one in service.http.get("/v1/teachers").json()["data"]]

    path, change = "/v1/teachers/mine", {"teacher": {**table, "model": "bigger"}}
    assert error_of(service.http.patch(path, json=change)) == (428, "if_match_missing")
    etag = {"if-match": seen.headers["etag"]}
    changed = service.http.patch(path, json=change, headers=etag)
    assert changed.json()["teacher"]["model"] == "bigger"
    assert error_of(service.http.patch(path, json=change, headers=etag)) == (412, "revision_mismatch")

    assert service.http.delete(path).status_code == 204
    for method in ("GET", "DELETE"):
        assert error_of(service.http.request(method, path)) == (404, "teacher_not_found")
    actions = [one["action"] for one in service.store.audit.list(limit=50, before=None) if one["object"] == "mine"]
    assert actions == ["teacher.delete", "teacher.update", "teacher.register"]


def test_the_same_request_registers_once(service: Service) -> None:
    table = {"kind": "openai", "url": "https://api.example.com", "model": "m"}
    first, again = (register(service, "once", table, **{"idempotency-key": "k"}) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert error_of(register(service, "other", table, **{"idempotency-key": "k"})) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "../x", "a" * 64, "-x", "é", "x\n"])
def test_a_name_is_one_that_a_run_can_say(service: Service, name: str) -> None:
    response = register(service, name, {"kind": "openai", "url": "https://x.example", "model": "m"})
    assert error_of(response) == (400, "invalid_request")
    assert response.json()["error"]["param"] == "/name"


@pytest.mark.parametrize(
    ("table", "param"),
    [
        ({"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "sk-canary"}, "/teacher/secret_ref"),
        ({"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "env:HOME"}, "/teacher/secret_ref"),
        ({"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "file:/etc/passwd"}, "/teacher/secret_ref"),
        ({"kind": "openai", "url": "https://x.example", "model": "m", "api_key": "sk-canary"}, "/teacher/api_key"),
        ({"kind": "openai", "url": "https://me:sk-canary@x.example", "model": "m"}, "/teacher/url"),
        ({"kind": "openai", "url": "http://10.0.0.7", "model": "m"}, "/teacher/url"),
        ({"kind": "openai", "url": "https://x.example", "model": "m", "answers": "/x"}, "/teacher/answers"),
        ({"kind": "server", "model": "tiny"}, "/teacher/model"),
        ({"kind": "self", "privileged_template": "x"}, "/teacher/kind"),
        ({}, "/teacher/kind"),
    ],
)
def test_what_may_not_be_registered_is_named_and_not_repeated(
    service: Service, table: dict[str, Any], param: str
) -> None:
    response = register(service, "bad", table)
    assert error_of(response) == (400, "invalid_config")
    assert response.json()["error"]["param"] == param
    assert "sk-canary" not in response.text
    assert error_of(service.http.get("/v1/teachers/bad")) == (404, "teacher_not_found")


def test_only_administrators_of_teachers_see_where_one_is(service: Service, served: str) -> None:
    service.http.post("/v1/teachers/real/probe", json={})
    with service.asking(service.key_for("anna", Scope.RUNS_READ)) as reader:
        seen = reader.get("/v1/teachers/real").json()
        assert (seen["id"], seen["teacher"], seen["probe"]["tier"]) == ("real", {"kind": "server"}, "FULL")
        for text in (json.dumps(seen), reader.get("/v1/teachers").text, reader.get("/v1/capabilities").text):
            assert served not in text
            assert "sesame" not in text
        assert error_of(reader.post("/v1/teachers", json={"name": "x", "teacher": {}})) == (403, "missing_scope")
        for method, path in (("PATCH", ""), ("DELETE", ""), ("POST", "/probe")):
            sent = {} if method == "DELETE" else {"json": {"teacher": {}} if method == "PATCH" else {}}
            assert error_of(reader.request(method, f"/v1/teachers/real{path}", **sent)) == (403, "missing_scope")
    with service.asking(service.key_for("ann", Scope.RUNS_READ, Scope.TEACHERS_ADMIN)) as administrator:
        assert administrator.get("/v1/teachers/real").json()["teacher"]["url"] == served


def test_a_teacher_stays_while_an_unfinished_run_names_it(service: Service) -> None:
    registered(service, "needed", {"kind": "openai", "url": "https://api.example.com", "model": "m"})
    body = submitted(name="borrower") | {"teacher": {"kind": "registered", "name": "needed"}}
    body["rollout"] = {**body["rollout"], "source": "teacher"}
    assert service.http.post("/v1/runs", json=body).status_code == 201
    assert service.http.get("/v1/runs/borrower/config").json()["teacher"] == body["teacher"]
    assert error_of(service.http.delete("/v1/teachers/needed")) == (409, "in_use")
    service.store.runs.move("borrower", State.CANCELLED, "a test says so")
    assert service.http.delete("/v1/teachers/needed").status_code == 204
    response = service.http.post("/v1/runs", json={**body, "name": "late"})
    assert response.json()["error"]["param"] == "/teacher/name"


# Probed


def test_a_probe_finds_what_a_real_server_offers_and_is_kept(service: Service, served: str) -> None:
    found = service.http.post("/v1/teachers/real/probe", json={})
    assert found.status_code == 200
    probe = found.json()["probe"]
    assert (probe["usable"], probe["tier"], probe["problems"]) == (True, "FULL", [])
    assert probe["measured"]["greedy_gap"] < 0.01
    assert service.http.get("/v1/teachers/real").json()["probe"] == probe
    teachers = {one["id"]: one["tier"] for one in service.http.get("/v1/capabilities").json()["teachers"]}
    assert teachers["real"] == "FULL"


def test_another_table_is_not_known_by_an_earlier_probe(service: Service, served: str) -> None:
    registered(service, "moving", server_at(served))
    probed = service.http.post("/v1/teachers/moving/probe", json={})
    headers = {"if-match": probed.headers["etag"]}
    moved = service.http.patch("/v1/teachers/moving", json={"teacher": server_at(nobody())}, headers=headers)
    assert (moved.json()["probe"], moved.json()["probed_at"]) == (None, None)


def test_a_probe_of_somebody_elses_server_is_told_its_tokenizer(service: Service) -> None:
    with scripted(endpoint_models.vllm()) as server:
        registered(service, "stock", {"kind": "vllm", "url": server.url, "model": "big", "deadline_s": 5})
        assert error_of(service.http.post("/v1/teachers/stock/probe", json={})) == (400, "tokenizer_needed")
        unknown = service.http.post("/v1/teachers/stock/probe", json={"tokenizer": "../tiny"})
        assert error_of(unknown) == (400, "tokenizer_unknown")
        probe = service.http.post("/v1/teachers/stock/probe", json={"tokenizer": "tiny"}).json()["probe"]
        assert (probe["tier"], probe["max_top_k"]) == ("TOPK", 5)


def test_a_probe_of_an_api_that_writes_asks_two_short_questions(service: Service) -> None:
    with scripted(endpoint_models.chat()) as server:
        registered(service, "chat", {"kind": "openai", "url": server.url, "model": "gpt"})
        probe = service.http.post("/v1/teachers/chat/probe", json={}).json()["probe"]
        assert (probe["usable"], probe["tier"], probe["repeats"]) == (True, "TEXT", True)
        assert len(server.asked) == 3


def test_a_probe_of_nobody_says_so_in_time(service: Service) -> None:
    registered(service, "away", server_at(nobody()))
    assert error_of(service.http.post("/v1/teachers/away/probe", json={})) == (502, "teacher_unreachable")
    with talking(None) as server:
        registered(service, "silent", server_at(server.url))
        probe = service.http.post("/v1/teachers/silent/probe", json={}).json()["probe"]
        assert (probe["usable"], probe["tier"], len(probe["problems"])) == (False, "TEXT", 1)
        registered(service, "patient", server_at(server.url, deadline_s=60))
        service.state.catalog.registry.probe_s, usual = 0.5, service.state.catalog.registry.probe_s
        assert error_of(service.http.post("/v1/teachers/patient/probe", json={})) == (504, "probe_timeout")
        service.state.catalog.registry.probe_s = usual
    with scripted(lambda *_: (200, {"hello": "<script>"})) as server:
        registered(service, "stranger", server_at(server.url))
        response = service.http.post("/v1/teachers/stranger/probe", json={})
        assert error_of(response) == (502, "teacher_unreachable")
        assert "script" not in response.text


# What there is


def test_capabilities_and_models_are_listed(service: Service) -> None:
    found = service.http.get("/v1/capabilities").json()
    assert (found["models"], found["datasets"]) == (["none", "tiny"], ["none.jsonl"])
    assert {"name", "tier", "phrase"} == found["methods"][0].keys()
    assert found["limits"]["file_bytes"] == 512 * 2**20
    models = service.http.get("/v1/models").json()
    assert (models["object"], [one["id"] for one in models["data"]]) == ("list", ["none", "tiny"])


def test_the_key_of_a_teacher_is_nowhere(service: Service, served: str) -> None:
    """Not in an answer, not in the database, not in a log: only in the file that names it."""
    secret = "hunter2-canary-7f3a"
    (service.folder / "secrets/canary").write_text(secret)
    registered(service, "canary", server_at(served) | {"secret_ref": "file:canary"})
    answers = [
        service.http.get("/v1/teachers/canary"),
        service.http.post("/v1/teachers/canary/probe", json={}),
        score(service, "canary"),
        service.http.get("/v1/capabilities"),
    ]
    assert [answer.status_code for answer in answers] == [200, 502, 400, 200]
    assert all(secret not in answer.text for answer in answers)
    holding = [path for path in service.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert holding == [service.folder / "secrets/canary"]
