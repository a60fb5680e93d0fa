"""Uploads that mean ill, or end in the middle: refused in our own words, in little memory, and nothing is left."""

from __future__ import annotations

import gzip
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.launchers import AwayLauncher
from tests.plain import PLAIN
from tests.services import Service, serving, until
from tests.uploading import PARQUET, ROWS, head, jsonl, left_over, parquet, refused, upload


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("files"), lambda _url: AwayLauncher()) as running:
        yield running


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
    with httpx2.Client(
        base_url=service.url, cookies={"potstill_session": session}, trust_env=False, verify=PLAIN
    ) as browser:
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


def test_a_client_that_falls_silent_is_given_up(service: Service) -> None:
    uploads = service.state.catalog.uploads
    uploads.silence_s, usual = 0.3, uploads.silence_s
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as raw:
        raw.sendall(head(service, length=1000) + jsonl(ROWS))
        assert raw.recv(4096).startswith(b"HTTP/1.1 408 ")
    uploads.silence_s = usual
    until(lambda: left_over(service) == [])


def test_answers_go_on_while_a_large_file_is_read(service: Service) -> None:
    large = jsonl([{"prompt": "x" * 100}]) * 200_000
    thread = threading.Thread(target=lambda: upload(service, large))
    thread.start()
    while thread.is_alive():
        assert service.http.get("/livez", timeout=5.0).status_code == 200
    thread.join()
    newest = service.http.get("/v1/files", params={"limit": 1}).json()["data"][0]
    assert newest["rows"] == 200_000
