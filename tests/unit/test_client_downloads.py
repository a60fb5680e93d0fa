"""Downloads: whole and verified or not there, gone on with where they broke off, and never beside their folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from potstill.client import AsyncClient, Client
from potstill.errors import ConfigError, ServiceError
from tests.served import serving

FILES = {
    "manifest.json": b"{}",
    "model/model.safetensors": bytes(range(256)) * 3000,
    "model/config.json": b"",
}
Trouble = Callable[[bytes, int], bytes | Response]


class Shelf:
    """A service with one checkpoint. `troubles` are what the next answers to requests for its large file suffer."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.names = {name: name for name in FILES}
        self.troubles: list[Trouble] = []
        self.asked: list[tuple[str, str | None]] = []
        self.app = Starlette(
            routes=[
                Route("/v1/runs/a/checkpoints/step-1", self.checkpoint),
                Route("/v1/runs/a/checkpoints/step-1/files/{name:path}", self.file),
                Route("/v1/files/file-1", self.uploaded),
                Route("/v1/files/file-1/content", self.content),
            ]
        )

    async def checkpoint(self, _request: Request) -> Response:
        files = [
            {"name": self.names[name], "bytes": len(content), "sha256": hashlib.sha256(FILES[name]).hexdigest()}
            for name, content in FILES.items()
        ]
        return JSONResponse({"id": "step-1", "status": "ready", "files": files})

    async def file(self, request: Request) -> Response:
        return self._send(request, request.path_params["name"])

    async def uploaded(self, _request: Request) -> Response:
        content = FILES["model/model.safetensors"]
        return JSONResponse({"id": "file-1", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})

    async def content(self, request: Request) -> Response:
        return self._send(request, "model/model.safetensors")

    def _send(self, request: Request, name: str) -> Response:
        content, asked = self.files[name], request.headers.get("range")
        self.asked.append((name, asked))
        start = 0 if asked is None else int(asked.removeprefix("bytes=").removesuffix("-"))
        if name == "model/model.safetensors" and self.troubles:
            sent = self.troubles.pop(0)(content, start)
            if isinstance(sent, Response):
                return sent
            return _cut_off(content[start:], sent, _headers(content, start, asked), 206 if asked else 200)
        status = 206 if asked else 200
        return Response(content[start:], status_code=status, headers=_headers(content, start, asked))


def _headers(content: bytes, start: int, asked: str | None) -> dict[str, str]:
    return {} if asked is None else {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}


def _cut_off(whole: bytes, sent: bytes, headers: dict[str, str], status: int) -> Response:
    """An answer that promises `whole` and ends its connection after `sent`."""

    async def body() -> Any:
        yield sent
        raise ConnectionError

    return StreamingResponse(body(), status_code=status, headers=headers | {"Content-Length": str(len(whole))})


def half(content: bytes, start: int) -> bytes:
    return content[start : start + (len(content) - start) // 2]


def refused(status: int, **headers: str) -> Trouble:
    return lambda _content, _start: JSONResponse({"error": {"message": "no", "code": "no"}}, status, headers=headers)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def url(shelf: Shelf) -> Iterator[str]:
    with serving(shelf.app) as running:
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_arrives_whole(url: str, tmp_path: Path):
    with Client(url, "k") as client:
        place = client.download_checkpoint("a", "step-1", tmp_path / "here" / "mine")
    assert place == tmp_path / "here" / "mine"
    assert contents(place) == FILES
    assert [path.name for path in place.parent.iterdir()] == ["mine"]


async def test_it_does_so_asynchronously(shelf: Shelf, url: str, tmp_path: Path):
    shelf.troubles = [half, half]
    async with AsyncClient(url, "k") as client:
        place = await client.download_checkpoint("a", "step-1", tmp_path / "mine")
    assert contents(place) == FILES


def test_a_connection_that_breaks_is_gone_on_with_where_it_broke(shelf: Shelf, url: str, tmp_path: Path):
    shelf.troubles = [half, half, refused(503, **{"retry-after": "0"})]
    with Client(url, "k") as client:
        place = client.download_checkpoint("a", "step-1", tmp_path / "mine")
    assert contents(place) == FILES
    size = len(FILES["model/model.safetensors"])
    ranges = [asked for name, asked in shelf.asked if name == "model/model.safetensors"]
    assert ranges == [None, f"bytes={size // 2}-", *[f"bytes={size // 2 + size // 4}-"] * 2]


def test_what_an_earlier_download_has_brought_is_not_asked_for_again(shelf: Shelf, url: str, tmp_path: Path):
    shelf.troubles = [half, refused(404)]
    with Client(url, "k") as client:
        with pytest.raises(ServiceError, match="no"):
            client.download_checkpoint("a", "step-1", tmp_path / "mine")
        assert not (tmp_path / "mine").exists()
        asked = len(shelf.asked)
        assert contents(client.download_checkpoint("a", "step-1", tmp_path / "mine")) == FILES
    size = len(FILES["model/model.safetensors"])
    assert shelf.asked[asked:] == [("model/model.safetensors", f"bytes={size // 2}-")]


def test_leftovers_of_another_download_are_taken_away(url: str, tmp_path: Path):
    old = tmp_path / ".mine.partial"
    (old / "model").mkdir(parents=True)
    (old / "gone" / "deep").mkdir(parents=True)
    (old / "gone" / "deep" / "file").write_bytes(b"x")
    (old / "manifest.json").symlink_to(tmp_path / "elsewhere")
    (old / "model" / "model.safetensors").write_bytes(b"no beginning of it")
    with Client(url, "k") as client:
        assert contents(client.download_checkpoint("a", "step-1", tmp_path / "mine")) == FILES
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_is_not_what_the_manifest_says_is_asked_for_once_more_and_then_refused(
    shelf: Shelf, url: str, tmp_path: Path
):
    shelf.files["model/model.safetensors"] = b"\0" * len(FILES["model/model.safetensors"])
    with (
        Client(url, "k") as client,
        pytest.raises(ServiceError, match=r"model\.safetensors does not come whole") as raised,
    ):
        client.download_checkpoint("a", "step-1", tmp_path / "mine")
    assert raised.value.code == "damaged_download"
    assert [name for name, _ in shelf.asked].count("model/model.safetensors") == 2
    assert not (tmp_path / "mine").exists()


def test_a_file_that_does_not_end_is_cut_short(shelf: Shelf, url: str, tmp_path: Path):
    shelf.files["model/model.safetensors"] = b"\0" * (len(FILES["model/model.safetensors"]) + 1)
    with Client(url, "k") as client, pytest.raises(ServiceError, match="is longer than the service said"):
        client.download_checkpoint("a", "step-1", tmp_path / "mine")


def whole(content: bytes, _start: int) -> Response:
    return Response(content)


def shifted(content: bytes, start: int) -> Response:
    return Response(content[start + 1 :], 206, headers=_headers(content, start + 1, "a range"))


@pytest.mark.parametrize("answer", [whole, shifted])
def test_a_service_that_sends_another_range_than_it_was_asked_for_is_not_taken_at_its_word(
    shelf: Shelf, url: str, tmp_path: Path, answer: Trouble
):
    shelf.troubles = [half, answer]
    with Client(url, "k") as client:
        assert contents(client.download_checkpoint("a", "step-1", tmp_path / "mine")) == FILES


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/passwd", "a/../../up", "a//b", "./a", "", ".", "..", "a\\b", "C:x", "a\nb", "model", "a\0b"],
)
def test_a_name_that_leaves_the_folder_is_refused_before_anything_is_fetched(
    shelf: Shelf, url: str, tmp_path: Path, name: str
):
    shelf.names["manifest.json"] = name
    with Client(url, "k") as client, pytest.raises(ServiceError) as raised:
        client.download_checkpoint("a", "step-1", tmp_path / "mine")
    assert raised.value.code == "unsafe_name"
    assert shelf.asked == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_overwritten(shelf: Shelf, url: str, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with Client(url, "k") as client:
        for taken in ("mine", "link"):
            with pytest.raises(ConfigError, match="name a place that is free"):
                client.download_checkpoint("a", "step-1", tmp_path / taken)
        (tmp_path / ".new.partial").symlink_to(tmp_path / "mine")
        with pytest.raises(ConfigError, match="is a link"):
            client.download_checkpoint("a", "step-1", tmp_path / "new")
    assert list((tmp_path / "mine").iterdir()) == []
    assert shelf.asked == []


def test_a_file_arrives_as_a_checkpoint_does(shelf: Shelf, url: str, tmp_path: Path):
    shelf.troubles = [half]
    with Client(url, "k") as client:
        place = client.download_file("file-1", tmp_path / "data.jsonl")
    assert place.read_bytes() == FILES["model/model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
