"""The two drivers over real HTTP: the same requests, answers and streams, whichever of them is used."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from potstill.client import AsyncClient, Client, Patience, Refused
from potstill.client.drivers import AsyncDriver, SyncDriver
from potstill.client.surface import Surface, Tale, Verb
from potstill.errors import ConfigError, ServiceError
from tests.served import serving

QUICK = Patience(tries=3, first_s=0.01, longest_s=0.02)


class Desk:
    """A service that writes down what it is asked, and can be busy for a while."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.busy = 0
        self.streams = 0
        self.left = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/runs", self.answer, methods=["GET", "POST"]),
                Route("/v1/runs/{run}", self.answer, methods=["GET", "DELETE", "PATCH"]),
                Route("/v1/runs/{run}/events", self.events),
                Route("/v1/files", self.answer, methods=["POST"]),
                Route("/v1/me", self.elsewhere),
                Route("/stolen", self.answer),
            ]
        )

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        asked = {
            "method": request.method,
            "query": sorted(request.query_params.multi_items()),
            "headers": dict(request.headers),
            "body": body,
        }
        self.asked.append(asked)
        if self.busy:
            self.busy -= 1
            refusal = {"error": {"message": "busy", "code": "busy"}}
            return JSONResponse(refusal, 503, headers={"retry-after": "0", "x-request-id": "r1"})
        if request.method == "DELETE":
            return Response(status_code=204)
        run = {"id": request.path_params.get("run", "made"), "status": "succeeded"}
        return JSONResponse(run, headers={"ETag": '"r1"'})

    async def events(self, request: Request) -> Response:
        if "text/event-stream" not in request.headers["accept"]:
            return JSONResponse({"data": [], "has_more": False, "last_id": None})
        self.streams += 1
        after = int(request.headers["last-event-id"])
        return StreamingResponse(self._told(after), media_type="text/event-stream")

    async def _told(self, after: int) -> AsyncIterator[bytes]:
        """Three events a connection, nine in all; the first connection is cut in mid-event."""
        yield b"retry: 3000\n\n"
        try:
            for seq in range(after + 1, min(after + 4, 10)):
                event = json.dumps({"seq": seq, "type": "t", "level": "info", "message": "é"})
                yield f"id: {seq}\nevent: run.event\ndata: {event}\n\n".encode()
            if after + 4 > 9:
                yield b"event: end\ndata: {}\n\n"
            elif after == 0:
                yield b"event: run.event\ndata: {"
        finally:
            self.left.set()

    async def elsewhere(self, _request: Request) -> Response:
        return RedirectResponse("/stolen")


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def url(desk: Desk) -> Iterator[str]:
    with serving(desk.app) as running:
        yield running


async def both(url: str, name: str, *args: Any, **kwargs: Any) -> list[Any]:
    """The same call by both clients: what each returned, or the error it raised."""
    found: list[Any] = []
    with Client(url, "ps_k", patience=QUICK) as client:
        try:
            found.append(await asyncio.to_thread(getattr(client, name), *args, **kwargs))
        except (ServiceError, ConfigError) as error:
            found.append(error)
    async with AsyncClient(url, "ps_k", patience=QUICK) as other:
        try:
            found.append(await getattr(other, name)(*args, **kwargs))
        except (ServiceError, ConfigError) as error:
            found.append(error)
    return found


def same(asked: list[dict[str, Any]]) -> dict[str, Any]:
    """The one request that both clients sent; a creation's name is each one's own."""
    for request in asked:
        for name in ("host", "idempotency-key"):
            request["headers"].pop(name, None)
    first, second = asked
    assert first == second
    return first


async def test_both_send_the_same_request_and_read_the_same_answer(desk: Desk, url: str):
    query = {"status": ["queued", "running"], "metadata": {"team": "a&b"}, "limit": 5}
    answers = await both(url, "list_runs", **query)
    assert answers == [{"id": "made", "status": "succeeded"}] * 2
    request = same(desk.asked)
    assert request["headers"]["authorization"] == "Bearer ps_k"
    assert request["query"] == [
        ("limit", "5"),
        ("metadata[team]", "a&b"),
        ("order", "desc"),
        ("status", "queued"),
        ("status", "running"),
    ]
    desk.asked.clear()
    await both(url, "create_run", {"name": "é"}, priority=3)
    request = same(desk.asked)
    assert json.loads(request["body"]) == {"name": "é", "priority": 3}
    assert request["headers"]["content-type"] == "application/json"


async def test_both_wait_for_a_service_that_is_busy_and_say_so_when_it_stays_so(desk: Desk, url: str):
    desk.busy = 2
    with Client(url, "k", patience=QUICK) as client:
        assert (await asyncio.to_thread(client.get_run, "a"))["id"] == "a"
    assert len(desk.asked) == 3
    desk.busy = 99
    for error in await both(url, "get_run", "a"):
        assert isinstance(error, Refused)
        assert (str(error), error.status, error.code, error.request_id) == ("busy", 503, "busy", "r1")


async def test_both_follow_a_stream_over_its_breaks(desk: Desk, url: str):
    with Client(url, "k") as client:
        told = await asyncio.to_thread(lambda: [event["seq"] for event in client.events("a")])
    async with AsyncClient(url, "k") as other:
        heard = [event["seq"] async for event in other.events("a")]
    assert told == heard == list(range(1, 10))
    assert desk.streams == 6


async def test_a_stream_that_nobody_listens_to_any_more_is_closed(desk: Desk, url: str):
    with Client(url, "k") as client:
        assert next(iter(client.events("a")))["seq"] == 1
        assert await asyncio.to_thread(desk.left.wait, 10.0)
    desk.left.clear()
    async with AsyncClient(url, "k") as other:
        told = other.events("a")
        assert (await anext(told))["seq"] == 1
        await told.aclose()
        assert await asyncio.to_thread(desk.left.wait, 10.0)


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".jsonl", "application/jsonl"), (".parquet", "application/vnd.apache.parquet")]
)
async def test_both_upload_from_disk_and_again_from_its_beginning(
    desk: Desk, url: str, tmp_path: Path, suffix: str, kind: str
):
    file = tmp_path / f"data{suffix}"
    file.write_bytes(b"0123456789abcdef" * 100_000)
    for client_busy in (1, 0):
        desk.busy = client_busy
        await both(url, "upload_file", file, filename="x y.jsonl")
    assert len(desk.asked) == 5
    for request in desk.asked:
        assert hashlib.sha256(request["body"]).digest() == hashlib.sha256(file.read_bytes()).digest()
        assert request["headers"]["content-type"] == kind
        assert request["headers"]["content-length"] == "1600000"
        assert request["query"] == [("filename", "x y.jsonl"), ("purpose", "prompts")]
    assert desk.asked[0]["headers"]["idempotency-key"] == desk.asked[1]["headers"]["idempotency-key"]


async def test_a_file_of_another_kind_is_not_sent(desk: Desk, url: str, tmp_path: Path):
    (tmp_path / "data.csv").touch()
    for path, words in ((tmp_path / "data.csv", r"\.jsonl or \.parquet"), (tmp_path / "no.jsonl", "no such file")):
        for error in await both(url, "upload_file", path):
            with pytest.raises(ConfigError, match=words):
                raise error
    assert desk.asked == []


async def test_a_key_does_not_follow_a_redirect_and_no_proxy_gets_it(
    desk: Desk, url: str, monkeypatch: pytest.MonkeyPatch
):
    for variable in ("HTTP_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for error in await both(url, "who_am_i"):
        assert isinstance(error, Refused)
        assert error.status == 307
    assert desk.asked == []


async def test_a_service_that_is_not_there_is_said_to_be_away(url: str):
    for error in await both("http://127.0.0.1:1", "get_run", "a"):
        assert isinstance(error, ServiceError)
        assert "http://127.0.0.1:1 does not answer" in str(error)


async def test_a_deletion_returns_nothing(url: str):
    assert await both(url, "delete_run", "a") == [None, None]


@pytest.mark.parametrize(
    "wrong", ["", "nowhere", "ftp://a", "http://", "http://me:pw@a", "http://a?b", "http://a#b", "http://a b"]
)
def test_what_is_no_base_url_is_refused(wrong: str):
    for client in (Client, AsyncClient):
        with pytest.raises(ConfigError, match="no base URL"):
            client(wrong, "k")


@pytest.mark.parametrize("key", ["a\nX-Admin: yes", "ключ", "a\0b"])
def test_a_key_that_would_be_more_than_a_key_is_refused(key: str):
    with pytest.raises(ConfigError, match="no key has"):
        Client("http://127.0.0.1:1", key)


def test_a_key_is_in_no_repr():
    client = Client("http://127.0.0.1:1", "ps_secret")
    assert "ps_secret" not in repr(client) + repr(vars(client))


def test_every_call_is_a_method_of_both_with_its_own_words():
    methods = {name: value for name, value in vars(Surface).items() if isinstance(value, Verb | Tale)}
    assert len(methods) > 40
    for (name, method), kind in itertools.product(methods.items(), (Client, AsyncClient)):
        described = getattr(kind, name)
        assert described.__name__ == name
        assert method.__doc__ == described.__doc__, name
        assert inspect.getdoc(described), name
    with Client("http://127.0.0.1:1", "k") as client:
        assert client.get_run.__doc__ == Client.get_run.__doc__
        assert list(inspect.signature(client.get_run).parameters) == ["run_id"]


def test_the_two_drivers_take_the_same_settings_and_steps():
    def methods(kind: type) -> dict[str, list[str]]:
        found = {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}
        return {
            name.replace("aenter", "enter").replace("aexit", "exit"): list(inspect.signature(value).parameters)
            for name, value in found.items()
        }

    assert methods(SyncDriver) == methods(AsyncDriver)
