"""Files over HTTP: uploaded by OpenAI's client and by hand, read line by line, kept while a run needs them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.service.principals import Scope
from orchestrator.service.runs import State
from potstill.config_file import parse
from potstill.environments import open_environment
from tests.launchers import AwayLauncher
from tests.service_configs import submitted
from tests.services import Service, serving, until

LINES = "application/jsonl"
PARQUET = "application/vnd.apache.parquet"
ROWS = [{"prompt": "1 + 1 = ?", "answer": "2"}, {"prompt": [{"role": "user", "content": "häh?"}], "domain": "d"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("files"), lambda _url: AwayLauncher()) as running:
        yield running


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


def upload(
    service: Service,
    content: Any,
    *,
    kind: str = LINES,
    name: str = "a.jsonl",
    purpose: str = "prompts",
    **headers: str,
) -> httpx2.Response:
    query = {"filename": name, "purpose": purpose}
    return service.http.post("/v1/files", content=content, params=query, headers={"content-type": kind, **headers})


def refused(response: httpx2.Response, status: int, code: str) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    return str(error["message"])


def left_over(service: Service) -> list[str]:
    return [path.name for path in (service.folder / "runs/.uploads").iterdir() if path.name.startswith(".")]


def read_by_a_run(service: Service, file_id: str) -> list[Any]:
    """The prompts that a run's own reader finds in the file."""
    with_file = {**submitted(), "data": {"kind": "jsonl", "path": file_id}}
    who = service.store.keys.bearer(service.key)
    environment = open_environment(service.state.catalog.resolve(with_file, who).data)
    return [environment.train(index) for index in range(2)]


# Taken in


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


# Refused


def test_wrong_lines_are_named_by_their_numbers(service: Service) -> None:
    wrong = b'{"prompt": 3}\n\n{"prompt": "x", "solution": 1}\nnot json\n[1]\n{"prompt": "fine"}\n'
    assert refused(upload(service, wrong), 400, "invalid_file").splitlines() == [
        "4 of 5 lines cannot be used:",
        "line 1: `prompt` must be a text or a list of messages",
        "line 3: `solution` must be a text",
        "line 4: not JSON: Expecting value",
        "line 5: a line is an object with `prompt`",
    ]
    assert left_over(service) == []


def test_of_many_wrong_lines_twenty_are_named(service: Service) -> None:
    said = refused(upload(service, b"{}\n" * 1000), 400, "invalid_file").splitlines()
    assert (said[0], len(said), said[-1]) == ("1000 of 1000 lines cannot be used:", 22, "(and 980 more)")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no line"),
        (b"\n\n \n", "no line"),
        (b"\xff\xfe{}", "line 1: not UTF-8"),
        (b'{"prompt": "x"}\n\xff\n', "line 2: not UTF-8"),
        (b"\xef\xbb\xbf" + jsonl(ROWS), "line 1: not JSON"),
        (b'{"prompt": "' + b"x" * (8 * 2**20) + b'"}', "line 1: longer than"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"prompt": "x", "answer": ' + b"9" * 10_000 + b"}", "line 1: not JSON"),
        (b'{"prompt": "\\ud800"}', "line 1: holds half a character"),
        (b'{"prompt": [{"role": "user"}]}', "line 1: every message"),
        (b"PAR1 and no more", "not Parquet"),
        (b"\x1f\x8b" + jsonl(ROWS), "line 1: not UTF-8"),
    ],
)
def test_a_file_that_a_run_could_not_read_is_refused(service: Service, content: bytes, said: str) -> None:
    assert said in refused(upload(service, content), 400, "invalid_file")
    assert left_over(service) == []


def shifted(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


@pytest.mark.parametrize(
    "content",
    [
        parquet(ROWS[:1])[:-9],
        parquet(ROWS[:1])[:-4] + b"PAR2",
        shifted(parquet([{"prompt": "x" * 999}], compression="none"), 30),
        parquet([{"prompt": b"bytes"}]),
        parquet([{"question": "x"}]),
        parquet([{"prompt": None}]),
        parquet([{"prompt": "x", "answer": float("nan")}]),
        parquet([{"prompt": "x", "domain": {"k": b"v"}}]),
        b"PAR1" + bytes(64) + b"PAR1",
        b"PAR1" + b"\xff" * 64 + (60).to_bytes(4, "little") + b"PAR1",
    ],
)
def test_parquet_that_is_damaged_or_holds_something_else_is_refused(service: Service, content: bytes) -> None:
    message = refused(upload(service, content, kind=PARQUET), 400, "invalid_file")
    assert str(service.folder) not in message
    assert left_over(service) == []


def test_a_small_file_that_stands_for_gigabytes_is_refused_in_little_memory(service: Service) -> None:
    """Some zeros, once in the file's dictionary, for 4,000 rows: 4 GiB; and 80 MiB of zeros in one row."""
    zeros = pa.array(["0" * 2**20])
    bombs = [
        pa.table({"prompt": pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), zeros)}),
        pa.table({"prompt": ["0" * (80 * 2**20)]}),
    ]
    files = []
    for bomb in bombs:
        buffer = io.BytesIO()
        pq.write_table(bomb, buffer, compression="zstd", use_dictionary=bomb is bombs[0], write_statistics=False)
        files.append(buffer.getvalue())
    before = psutil.Process().memory_info().rss
    for file in files:
        assert len(file) < 2**20
        refused(upload(service, file, kind=PARQUET), 400, "invalid_file")
    assert psutil.Process().memory_info().rss - before < 2**26
    assert left_over(service) == []


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate", "GZIP", "identity, gzip"])
def test_an_encoded_body_is_refused_and_not_decoded(service: Service, encoding: str) -> None:
    content = gzip.compress(b"0" * 2**20)
    refused(upload(service, content, **{"content-encoding": encoding}), 415, "content_encoding")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("application/json", "content_type"),
        ("text/plain", "content_type"),
        ("application/x-www-form-urlencoded", "content_type"),
    ],
)
def test_another_kind_of_body_is_refused(service: Service, kind: str, code: str) -> None:
    refused(upload(service, jsonl(ROWS), kind=kind), 415, code)


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/teachers", "/v1/files/", "/v1/files/x", "/v1/score", "/v1//files"])
def test_no_other_path_takes_a_form(service: Service, path: str) -> None:
    response = service.http.post(path, files={"file": ("x", jsonl(ROWS))}, data={"purpose": "prompts"})
    refused(response, 415, "content_type")


def test_a_page_of_another_site_cannot_upload_with_a_session(service: Service) -> None:
    """A form may be sent across sites without asking; what it lacks is an Origin of ours."""
    who = service.store.keys.bearer(service.key)
    session = service.store.keys.open_session(who.key_id, 600.0)
    form = {"files": {"file": ("x", jsonl(ROWS))}, "data": {"purpose": "prompts"}}
    host = service.url.partition("://")[2]
    with httpx2.Client(base_url=service.url, cookies={"potstill_session": session}, trust_env=False) as browser:
        for origin in (
            "https://evil.example",
            "null",
            f"http://{host}.evil.example",
            f"http://{host[:-1]}",
            "http://localhost",
        ):
            refused(browser.post("/v1/files", headers={"origin": origin}, **form), 403, "origin_not_allowed")
        refused(browser.post("/v1/files", **form), 403, "no_origin")
        assert browser.post("/v1/files", headers={"origin": service.url}, **form).status_code == 201


FORM = "multipart/form-data; boundary=b"
FILE_PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n{"prompt": "x"}\r\n'
PURPOSE_PART = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nprompts\r\n'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--\r\n",
        b"no form at all",
        FILE_PART + PURPOSE_PART,  # without its end
        FILE_PART + FILE_PART + PURPOSE_PART + b"--b--\r\n",
        PURPOSE_PART + PURPOSE_PART + FILE_PART + b"--b--\r\n",
        PURPOSE_PART + b"--b--\r\n",
        PURPOSE_PART + FILE_PART.replace(b'; filename="x"', b"") + b"--b--\r\n",
        PURPOSE_PART + FILE_PART.replace(b'name="file"', b'name="other"') + b"--b--\r\n",
        FILE_PART + PURPOSE_PART.replace(b"purpose", b"expires_after") + b"--b--\r\n",
        FILE_PART + PURPOSE_PART.replace(b"prompts", b"x" * 2000) + b"--b--\r\n",
        FILE_PART.replace(b'filename="x"', b'filename="\xff"') + PURPOSE_PART + b"--b--\r\n",
        FILE_PART.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 9000 + b"\r\n\r\n", 1) + PURPOSE_PART + b"--b--\r\n",
        FILE_PART.replace(b"\r\n\r\n", b"\r\nX: y" * 99 + b"\r\n\r\n", 1) + PURPOSE_PART + b"--b--\r\n",
    ],
)
def test_a_form_that_is_not_one_file_and_its_purpose_is_refused(service: Service, body: bytes) -> None:
    refused(service.http.post("/v1/files", content=body, headers={"content-type": FORM}), 400, "invalid_form")
    assert left_over(service) == []


@pytest.mark.parametrize("boundary", ["", "; boundary=", f"; boundary={'b' * 999}"])
def test_a_form_without_a_boundary_is_refused(service: Service, boundary: str) -> None:
    response = service.http.post(
        "/v1/files", content=FILE_PART, headers={"content-type": f"multipart/form-data{boundary}"}
    )
    refused(response, 400, "invalid_form")


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "x/", "\u202egpj.exe", "a" * 256, "\x1b[31m"])
def test_a_name_is_printable(service: Service, name: str) -> None:
    assert upload(service, jsonl(ROWS), name=name).status_code == 400


@pytest.mark.parametrize("purpose", ["", "train", "assistants", "PROMPTS"])
def test_a_purpose_is_one_of_ours(service: Service, purpose: str) -> None:
    refused(upload(service, jsonl(ROWS), purpose=purpose), 400, "invalid_purpose")


def test_a_name_with_markup_is_kept_as_text(service: Service) -> None:
    name = '<img src=x onerror="alert(1)">"; rm -rf.jsonl'
    file = upload(service, jsonl(ROWS), name=name).json()
    assert file["filename"] == name
    headers = service.http.get(f"/v1/files/{file['id']}/content").headers
    assert headers["content-disposition"] == f'attachment; filename="{file["id"]}"'
    assert headers["x-content-type-options"] == "nosniff"


# Too large


def head(service: Service, *, length: int) -> bytes:
    """What a client sends of an upload before its body."""
    asked = f"POST /v1/files?filename=a&purpose=prompts HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {LINES}\r\n"
    return f"{asked}Authorization: Bearer {service.key}\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_file_that_is_announced_too_large_is_refused_before_it_comes(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as raw:
        raw.sendall(head(service, length=2**40))
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_file_that_grows_too_large_is_refused_while_it_comes(tmp_path: Path) -> None:
    """Without an announced length; the memory that it takes does not depend on how much comes."""
    with serving(tmp_path, lambda _url: AwayLauncher()) as service:
        service.state.catalog.uploads.max_bytes = 16 * 2**20
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            while sent < 256 * 2**20:
                sent += 2**20
                yield b"x" * 2**20

        before = psutil.Process().memory_info().rss
        with suppress(httpx2.TransportError):  # the service closes the connection while its client still sends
            refused(upload(service, endless()), 413, "file_too_large")
        assert sent < 256 * 2**20
        assert psutil.Process().memory_info().rss - before < 64 * 2**20
        until(lambda: left_over(service) == [])
        assert service.http.get("/v1/files").json()["data"] == []


def test_a_client_that_leaves_midway_leaves_nothing(service: Service) -> None:
    before = len(service.http.get("/v1/files").json()["data"])
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as raw:
        raw.sendall(head(service, length=1000) + jsonl(ROWS))
        until(lambda: left_over(service))
    until(lambda: left_over(service) == [])
    assert len(service.http.get("/v1/files").json()["data"]) == before


def test_answers_go_on_while_a_large_file_is_read(service: Service) -> None:
    large = jsonl([{"prompt": "x" * 100}]) * 200_000
    thread = threading.Thread(target=lambda: upload(service, large))
    thread.start()
    while thread.is_alive():
        assert service.http.get("/livez", timeout=5.0).status_code == 200
    thread.join()
    newest = service.http.get("/v1/files", params={"limit": 1}).json()["data"][0]
    assert newest["rows"] == 200_000


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
