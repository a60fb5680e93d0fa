"""Text that registered teachers score: real teacher servers, scripted ones, and silent ones."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from orchestrator.service.principals import Scope
from orchestrator.service.routes.score import MOST_NUMBERS
from orchestrator.service.scorers import MOST_AT_A_TIME
from tests import endpoint_models
from tests.builders_teacher import KEY, teacher_server
from tests.endpoints import Exact, scripted
from tests.launchers import AwayLauncher
from tests.registering import COMPLETION, CONTEXT, ITEM, error_of, nobody, register, registered, score, server_at
from tests.services import Service, serving, until
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


def test_scores_are_the_models_own(service: Service, served: str) -> None:
    exact = Exact(service.folder / "models/tiny").logprobs(CONTEXT, np.array(COMPLETION))
    answer = score(service, top_k=3).json()
    (item,) = answer["items"]
    np.testing.assert_allclose(item["sampled"], exact[range(4), COMPLETION], atol=1e-4)
    np.testing.assert_array_equal(item["topk_ids"], np.argsort(-exact, axis=1)[:, :3])
    assert answer["model"] == "tiny"
    expected = {"expect_revision": answer["revision"], "model": "tiny"}
    assert score(service, **expected, expect_tokenizer_fingerprint=answer["tokenizer_fingerprint"]).status_code == 200


def test_a_batch_beyond_one_request_of_the_server_is_split(service: Service, served: str) -> None:
    items = [{**ITEM, "id": f"i{index}"} for index in range(10)]
    answer = score(service, items=items).json()
    assert [item["id"] for item in answer["items"]] == [item["id"] for item in items]
    assert {item["status"] for item in answer["items"]} == {0}


def test_a_stock_server_scores_in_the_tokenizer_that_is_named(service: Service) -> None:
    with scripted(endpoint_models.vllm()) as server:
        registered(service, "stock2", {"kind": "vllm", "url": server.url, "model": "big", "deadline_s": 5})
        assert error_of(score(service, "stock2")) == (400, "tokenizer_needed")
        (item,) = score(service, "stock2", tokenizer="tiny").json()["items"]
        law = [endpoint_models.law(tuple([*CONTEXT, *COMPLETION][:at]))[one] for at, one in enumerate(COMPLETION, 3)]
        np.testing.assert_allclose(item["sampled"], law, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"items": []}, "/items"),
        ({"items": [{**ITEM, "completion_ids": []}]}, "/items/0/completion_ids"),
        ({"items": [{**ITEM, "completion_ids": [-1]}]}, "/items/0/completion_ids"),
        ({"items": [{**ITEM, "completion_ids": [2**31]}]}, "/items/0/completion_ids"),
        ({"items": [{**ITEM, "completion_ids": "abc"}]}, "/items/0/completion_ids"),
        ({"items": [ITEM, ITEM]}, "/items"),
        ({"items": [{**ITEM, "more": 1}]}, "/items/0/more"),
        ({"temperature": 0.5}, "/temperature"),
        ({"temperature": "x"}, "/temperature"),
        ({"top_k": -1}, "/top_k"),
        ({"num_ids": 2}, "/items/0/token_ids"),
        ({"seed": 7}, "/seed"),
        ({"deadline_ms": 0}, "/deadline_ms"),
        ({"teacher": None}, "/teacher"),
        ({"teacher": 7}, "/teacher"),
        ({"tokenizer": ["tiny"]}, "/tokenizer"),
        ({"url": "http://10.0.0.1"}, "/url"),
    ],
)
def test_a_question_that_is_none_is_refused_by_its_field(service: Service, fields: dict[str, Any], param: str) -> None:
    response = score(service, **fields)
    assert error_of(response) == (400, "invalid_request")
    assert response.json()["error"]["param"] == param


def test_what_nobody_should_score_is_refused(service: Service, served: str) -> None:
    with service.asking(service.key_for("anna", Scope.RUNS_READ, Scope.RUNS_WRITE)) as reader:
        refusal = reader.post("/v1/score", json={"teacher": "real", "items": [ITEM]})
        assert error_of(refusal) == (403, "missing_scope")
    with service.asking(service.key_for("anna", Scope.SCORES_WRITE)) as scorer:
        assert scorer.post("/v1/score", json={"teacher": "real", "items": [ITEM]}).status_code == 200
    for name in ("absent", "../real", "REAL", ""):
        assert error_of(score(service, name)) == (404, "teacher_not_found")
    registered(service, "writer", {"kind": "openai", "url": "https://api.example.com", "model": "m"})
    assert error_of(score(service, "writer")) == (400, "scores_nothing")
    assert error_of(score(service, expect_revision="another")) == (412, "revision_changed")
    assert error_of(score(service, model="another")) == (412, "revision_changed")
    assert error_of(score(service, expect_tokenizer_fingerprint="0" * 64)) == (422, "tokenizer_mismatch")
    too_much = [{**ITEM, "completion_ids": [5] * 400}]
    assert error_of(score(service, items=too_much, top_k=MOST_NUMBERS // 800)) == (413, "answer_too_large")


def test_what_a_teacher_says_of_a_question_is_not_passed_on(service: Service, served: str) -> None:
    response = score(service, items=[{**ITEM, "completion_ids": [10_000]}])
    assert error_of(response) == (400, "teacher_refused")
    assert served not in response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((503, {"error": {"message": "canary"}}), (503, "teacher_unavailable")),
        ((500, {"error": {"message": "canary"}}), (503, "teacher_unavailable")),
        ((401, {"error": {"message": "canary"}}), (400, "teacher_refused")),
        ((404, {"detail": "canary"}), (400, "teacher_refused")),
        ((302, {"canary": 1}), (400, "teacher_refused")),
        ((200, {"canary": 1}), (502, "teacher_answer")),
    ],
)
def test_a_teacher_that_does_not_score_is_told_in_our_own_words(
    service: Service, answer: tuple[int, Any], expected: tuple[int, str]
) -> None:
    with talking(answer) as server:
        name = f"says-{answer[0]}-{expected[0]}"
        registered(service, name, server_at(server.url, deadline_s=1 if expected[0] == 503 else 20))
        response = score(service, name)
    assert error_of(response) == expected
    assert "canary" not in response.text
    assert server.url not in response.text


def test_a_teacher_that_is_away_or_silent_is_given_up(service: Service) -> None:
    registered(service, "gone", server_at(nobody()))
    response = score(service, "gone")
    assert error_of(response) == (503, "teacher_unavailable")
    assert response.headers["retry-after"]
    with talking(None) as server:
        registered(service, "mute", server_at(server.url, deadline_s=30))
        response = score(service, "mute", deadline_ms=300)
        assert error_of(response) == (504, "deadline_exceeded")
        assert response.json()["error"]["type"] == "teacher_error"


def test_when_the_client_leaves_the_question_is_taken_back(service: Service) -> None:
    with talking(None) as server:
        registered(service, "slow", server_at(server.url, deadline_s=60))
        body = json.dumps({"teacher": "slow", "items": [ITEM]}).encode()
        with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as raw:
            head = f"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {service.key}\r\n"
            raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            assert server.asked.wait(10)
            assert not server.left.is_set()
        assert server.left.wait(10)
    until(lambda: service.state.catalog.scorers.asked == 0)


def test_more_questions_than_there_are_places_are_refused_at_once(service: Service) -> None:
    with talking(None) as server:
        registered(service, "busy", server_at(server.url, deadline_s=60))
        waiting = [
            threading.Thread(target=lambda: score(service, "busy", deadline_ms=5000)) for _ in range(MOST_AT_A_TIME)
        ]
        for thread in waiting:
            thread.start()
        until(lambda: service.state.catalog.scorers.asked == MOST_AT_A_TIME)
        response = score(service, "busy")
        assert error_of(response) == (503, "overloaded")
        assert service.http.get("/livez").status_code == 200
        for thread in waiting:
            thread.join()
    assert service.state.catalog.scorers.asked == 0


def test_a_teacher_that_moved_is_asked_at_its_new_place(service: Service, served: str) -> None:
    registered(service, "mover", server_at(nobody()))
    assert error_of(score(service, "mover")) == (503, "teacher_unavailable")
    etag = service.http.get("/v1/teachers/mover").headers["etag"]
    service.http.patch("/v1/teachers/mover", json={"teacher": server_at(served)}, headers={"if-match": etag})
    assert score(service, "mover").status_code == 200
