"""Files over HTTP: uploaded by OpenAI's client and by hand, read line by line, kept while a run needs them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from orchestrator.service.principals import Scope
from orchestrator.service.runs import State
from orchestrator.service.store.files import Room
from orchestrator.service.uploads import Uploads
from potstill.config_file import parse
from potstill.errors import ServiceError
from tests.launchers import AwayLauncher
from tests.service_configs import submitted
from tests.services import Service, serving
from tests.uploading import LINES, PARQUET, ROWS, jsonl, left_over, parquet, read_by_a_run, refused, upload


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("files"), lambda _url: AwayLauncher()) as running:
        yield running


def test_a_body_of_lines_is_a_file(service: Service) -> None:
    content = jsonl(ROWS)
    response = upload(service, content)
    file = response.json()
    assert (response.status_code, response.headers["location"]) == (201, f"/v1/files/{file['id']}")
    assert file.pop("created_at") > 1.7e9
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(content),
        "filename": "a.jsonl",
        "purpose": "prompts",
        "status": "processed",
        "format": "jsonl",
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": 2,
        "columns": ["prompt", "answer", "domain"],
    }
    assert service.http.get(f"/v1/files/{file['id']}/content").content == content
    assert [prompt.messages[0].content for prompt in read_by_a_run(service, file["id"])] == ["1 + 1 = ?", "häh?"]
    assert left_over(service) == []


def test_openais_client_uploads_lists_reads_and_deletes(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=0)
    conversation = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    content = jsonl([{"messages": conversation}, {"prompt": "2 + 2", "solution": "4"}])
    file = client.files.create(file=("../../etc/träin.jsonl", content), purpose="fine-tune")
    assert (file.filename, file.purpose, file.bytes, file.status) == (
        "träin.jsonl",
        "fine-tune",
        len(content),
        "processed",
    )
    assert client.files.retrieve(file.id) == file
    assert file.id in [one.id for one in client.files.list(purpose="fine-tune")]
    assert client.files.content(file.id).read() == content
    first, second = read_by_a_run(service, file.id)
    assert ([m.content for m in first.messages], first.solution) == (["1 + 1"], "2")
    assert ([m.content for m in second.messages], second.solution) == (["2 + 2"], "4")
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert not list((service.folder / "runs/.uploads").glob(f"{file.id}*"))


@pytest.mark.parametrize("options", [{}, {"row_group_size": 1}, {"compression": "zstd"}, {"use_dictionary": False}])
def test_parquet_is_read_row_group_by_row_group_and_kept_as_lines(service: Service, options: dict[str, Any]) -> None:
    rows = [{"prompt": f"{i}?", "answer": i, "score": 0.5, "private": ["x"] if i else None} for i in range(40)]
    file = upload(service, parquet(rows, **options), kind=PARQUET, name="a.parquet").json()
    assert (file["format"], file["rows"], file["columns"]) == ("parquet", 40, ["prompt", "answer", "score", "private"])
    first, second = read_by_a_run(service, file["id"])
    assert (first.messages[0].content, first.answer, first.private) == ("0?", "0", ())
    assert (second.messages[0].content, second.answer, second.private) == ("1?", "1", ("x",))


def test_a_form_tells_parquet_by_its_bytes(service: Service) -> None:
    files = {"file": ("x.bin", parquet([{"prompt": [{"role": "user", "content": "hi"}]}]), "application/octet-stream")}
    file = service.http.post("/v1/files", files=files, data={"purpose": "eval"}).json()
    assert (file["format"], file["purpose"]) == ("parquet", "eval")
    assert read_by_a_run(service, file["id"])[0].messages[0].content == "hi"


def test_the_same_request_makes_one_file(service: Service) -> None:
    def send(content: bytes = jsonl(ROWS)) -> httpx2.Response:
        return upload(service, content, name="once.jsonl", **{"idempotency-key": "k1"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: send(), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 7
    refused(send(jsonl(ROWS * 2)), 422, "idempotency_key_reused")
    stored = list((service.folder / "runs/.uploads").iterdir())
    assert all(service.store.files.exists(path.name.removesuffix(".jsonl")) for path in stored)


# Whose it is, and who uses it


def test_a_file_is_its_owners_alone(service: Service) -> None:
    with service.asking(service.key_for("anna", Scope.RUNS_READ, Scope.RUNS_WRITE)) as anna:
        headers = {"content-type": LINES}
        query = {"filename": "mine.jsonl", "purpose": "prompts"}
        file = anna.post("/v1/files", content=jsonl(ROWS), params=query, headers=headers).json()
        assert [one["id"] for one in anna.get("/v1/files").json()["data"]] == [file["id"]]
    with service.asking(service.key_for("ben", Scope.RUNS_READ, Scope.RUNS_WRITE)) as ben:
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            refused(ben.request(method, f"/v1/files/{file['id']}{path}"), 404, "file_not_found")
        assert ben.get("/v1/files").json()["data"] == []
        stolen = submitted(name="stolen") | {"data": {"kind": "jsonl", "path": file["id"]}}
        assert "data.path: no file" in refused(ben.post("/v1/runs", json=stolen), 400, "invalid_config")
    with service.asking(service.key_for("anna", Scope.RUNS_READ)) as reader:
        refused(reader.delete(f"/v1/files/{file['id']}"), 403, "missing_scope")


def test_a_key_keeps_as_many_bytes_as_it_may(service: Service) -> None:
    content = jsonl(ROWS)
    headers = {"content-type": LINES}
    query = {"filename": "a.jsonl", "purpose": "prompts"}
    key = service.key_for("eve", Scope.RUNS_READ, Scope.RUNS_WRITE, stored_bytes=len(content) * 3 // 2)
    with service.asking(key) as eve:
        keyed = headers | {"Idempotency-Key": "once"}
        first = eve.post("/v1/files", content=content, params=query, headers=keyed).json()
        assert eve.post("/v1/files", content=content, params=query, headers=keyed).json() == first
        for sent in (content, iter([content])):  # the second without a length
            told = refused(eve.post("/v1/files", content=sent, params=query, headers=headers), 429, "quota_exceeded")
            assert f"{len(content)} of {len(content) * 3 // 2}" in told
        stored = list((service.folder / "runs/.uploads").iterdir())
        assert all(service.store.files.exists(path.name.removesuffix(".jsonl")) for path in stored)
        assert eve.delete(f"/v1/files/{first['id']}").status_code == 200
        assert eve.post("/v1/files", content=content, params=query, headers=headers).status_code == 201


def test_a_byte_too_many_for_its_key_is_refused_while_the_rest_still_comes(service: Service, tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, service.store.files)
    with uploads.incoming(Room(5, 10)) as incoming:
        incoming.write(b"12345")
        with pytest.raises(ServiceError, match="5 of 10 are used") as raised:
            incoming.write(b"6")
    assert raised.value.status == 429
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file-..%2f..%2fpotstill.db", "..", "%2e%2e", "file-0", "file-%00", "a" * 3000])
def test_an_id_leads_nowhere_else(service: Service, name: str) -> None:
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content"):
        assert service.http.get(path).status_code in {400, 404}


def test_a_file_stays_while_an_unfinished_run_names_it(service: Service) -> None:
    file = upload(service, jsonl(ROWS)).json()
    body = submitted(name="needs-it") | {"data": {"kind": "jsonl", "path": file["id"]}}
    assert service.http.post("/v1/runs", json=body).status_code == 201
    assert parse(service.http.get("/v1/runs/needs-it/config").json()).data.path == file["id"]
    refused(service.http.delete(f"/v1/files/{file['id']}"), 409, "in_use")
    service.store.runs.move("needs-it", State.CANCELLED, "a test says so")
    assert service.http.delete(f"/v1/files/{file['id']}").json() == {
        "id": file["id"],
        "object": "file",
        "deleted": True,
    }
    again = service.http.post("/v1/runs", json={**body, "name": "needs-it-again"})
    assert "data.path: no file" in refused(again, 400, "invalid_config")


def test_what_changes_is_in_the_audit_log(service: Service) -> None:
    file = upload(service, jsonl(ROWS)).json()
    service.http.delete(f"/v1/files/{file['id']}")
    told = [
        record["action"] for record in service.store.audit.list(limit=9, before=None) if record["object"] == file["id"]
    ]
    assert told == ["file.delete", "file.upload"]


def test_what_a_killed_process_left_is_swept_away(service: Service) -> None:
    folder = service.folder / "runs/.uploads"
    kept = upload(service, jsonl(ROWS)).json()["id"]
    old = [".incoming-0123", ".incoming-0123.jsonl", "file-" + "a" * 28, "file-" + "a" * 28 + ".jsonl"]
    for name in (*old, ".incoming-4567", "file-" + "b" * 28, "somebody-elses"):
        (folder / name).write_text("x")
    for name in (*old, kept, "somebody-elses"):
        os.utime(folder / name, (1, 1))
    service.state.catalog.uploads.sweep()
    left = {path.name for path in folder.iterdir()}
    assert left.isdisjoint(old)
    assert left >= {kept, ".incoming-4567", "file-" + "b" * 28, "somebody-elses"}
    for name in (".incoming-4567", "file-" + "b" * 28, "somebody-elses"):
        (folder / name).unlink()
