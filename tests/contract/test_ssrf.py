"""URLs that mean ill, against registration, submission and calls of a real service: no canary hears of any of them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from orchestrator.service.jobs import teachers_allowed
from potstill.calling.guard import Guard
from potstill.teachers.opening import ALLOWED
from tests.hostile_urls import ADDRESSES, URLS
from tests.launchers import AwayLauncher
from tests.service_configs import submitted
from tests.services import Service, serving
from tests.talking import talking

HOSTS = ("127.0.0.2", "127.0.0.3", "::1")
ITEM = {"id": "a", "context_ids": [1], "completion_ids": [2]}
ELSEWHERE = "10.9.8.0/24"  # a private network that may be called, and that nobody here is in


@dataclass
class Canaries:
    port: int = 0
    heard: list[tuple[Any, ...]] = field(default_factory=list)


@pytest.fixture(scope="module")
def canaries() -> Iterator[Canaries]:
    """One port on every address of HOSTS; whoever so much as connects is remembered."""
    birds = Canaries()
    with ExitStack() as stack:
        for host in HOSTS:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, birds.port), family=family)
            birds.port = listening.getsockname()[1]
            thread = threading.Thread(target=_hear, args=(listening, birds), daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(listening.close)
            stack.callback(listening.shutdown, socket.SHUT_RDWR)
        yield birds


def _hear(listening: socket.socket, birds: Canaries) -> None:
    while True:
        try:
            connection, address = listening.accept()
        except OSError:
            return
        birds.heard.append(address)
        connection.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Its operator lets teachers be called in one private network, which is not this machine's."""
    folder = tmp_path_factory.mktemp("ssrf")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(ALLOWED, ELSEWHERE)
        with serving(folder, lambda _url: AwayLauncher()) as running:
            (folder / "secrets/key").write_text("sesame")
            assert teachers_allowed() == ELSEWHERE
            yield running


@contextmanager
def guarded(service: Service, guard: Guard) -> Iterator[None]:
    """The service under another list, or another resolver."""
    registry = service.state.catalog.registry
    before, registry.guard = registry.guard, guard
    try:
        yield
    finally:
        registry.guard = before


class Resolver:
    """Gives the n-th asker the n-th answer, the last one ever after."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers[min(len(self.asked), len(self._answers)) - 1]


def tables(url: str) -> list[dict[str, Any]]:
    """A teacher of every kind that is called, at the URL."""
    return [
        {"kind": "server", "url": url, "secret_ref": "file:key", "deadline_s": 2},
        {"kind": "server", "url": "https://good.example", "secret_ref": "file:key", "replicas": [url]},
        {"kind": "vllm", "url": url, "model": "m"},
        {"kind": "completions", "url": url, "model": "m", "context_length": 64},
        {"kind": "openai", "url": url, "model": "m"},
    ]


def register(service: Service, name: str, table: dict[str, Any]) -> httpx2.Response:
    return service.http.post("/v1/teachers", json={"name": name, "teacher": table})


def error_of(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_the_corpus_is_long_and_has_none_twice() -> None:
    assert len(set(URLS)) == len(URLS) >= 150


def test_the_canaries_sing(canaries: Canaries) -> None:
    for host in HOSTS:
        with socket.create_connection((host, canaries.port)) as connection:
            connection.recv(1)
    assert len(canaries.heard) == len(HOSTS)
    canaries.heard.clear()


def test_no_such_url_is_registered_and_nothing_is_sent(service: Service, canaries: Canaries) -> None:
    for url in URLS:
        said = url.format(port=canaries.port)
        for table in tables(said):
            response = register(service, "evil", table)
            assert error_of(response) == (400, "invalid_config"), said
            assert response.json()["error"]["param"] in {"/teacher/url", "/teacher/replicas/0"}, said
    assert service.http.get("/v1/teachers").json()["data"] == []
    assert canaries.heard == []


def test_no_such_url_is_taken_from_a_run_and_nothing_is_sent(service: Service, canaries: Canaries) -> None:
    good = ["https://teacher.example", "http://10.9.8.7:8001"]
    for url in (*URLS, *good):
        said = url.format(port=canaries.port)
        for place in ({"teacher": tables(said)[0]}, {"data": {"kind": "jsonl", "path": said}}):
            for dry_run in ("true", "false"):
                response = service.http.post("/v1/runs", json=submitted() | place, params={"dry_run": dry_run})
                assert error_of(response) == (400, "invalid_config"), said
    assert service.http.get("/v1/runs").json()["data"] == []
    assert canaries.heard == []


def test_a_good_url_in_the_listed_network_is_registered(service: Service) -> None:
    for index, url in enumerate(("http://10.9.8.7:8001", "https://10.9.8.7", "https://teacher.example:8443/v1")):
        assert register(service, f"good-{index}", tables(url)[0]).status_code == 201
        assert service.http.delete(f"/v1/teachers/good-{index}").status_code == 204


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_name_that_leads_to_a_bad_address_is_not_called(service: Service, canaries: Canaries, scheme: str) -> None:
    """Registered it may be: nobody is asked what a name means before it is called."""
    url = f"{scheme}://teacher.example:{canaries.port}"
    assert register(service, f"named-{scheme}", tables(url)[0]).status_code == 201
    for address in ADDRESSES.split():
        for answers in ([address], ["10.9.8.7", address], [address, "10.9.8.7"]):
            resolver = Resolver(answers)
            with guarded(service, Guard((ELSEWHERE,), resolve=resolver)):
                fresh_scorers(service, f"named-{scheme}", url)
                response = service.http.post("/v1/score", json={"teacher": f"named-{scheme}", "items": [ITEM]})
            assert error_of(response) == (502, "teacher_not_called"), answers
            assert address not in response.text
            assert resolver.asked == ["teacher.example"]
    assert canaries.heard == []


def test_a_probe_does_not_call_a_bad_address_either(service: Service, canaries: Canaries) -> None:
    url = f"http://teacher.example:{canaries.port}"
    for index, table in enumerate(tables(url)):
        assert register(service, f"probed-{index}", table).status_code == 201
        for address in ADDRESSES.split():
            with guarded(service, Guard((ELSEWHERE,), resolve=Resolver([address]))):
                service.http.post(f"/v1/teachers/probed-{index}/probe", json={"tokenizer": "absent"})
    assert canaries.heard == []


def test_a_name_that_changes_its_mind_between_two_calls_gains_nothing(service: Service, canaries: Canaries) -> None:
    with talking((404, {})) as good:
        port = good.url.rpartition(":")[2]
        url = f"http://teacher.example:{port}"
        assert register(service, "rebinding", tables(url)[0]).status_code == 201
        resolver = Resolver(["127.0.0.1"], ["127.0.0.2"], ["169.254.169.254"], ["::1"])
        with guarded(service, Guard(("127.0.0.1/32",), resolve=resolver)):
            found = []
            for _ in range(4):
                fresh_scorers(service, "rebinding", url)
                found.append(service.http.post("/v1/score", json={"teacher": "rebinding", "items": [ITEM]}).status_code)
    assert found == [400, 502, 502, 502]
    assert canaries.heard == []


def test_a_redirect_is_not_followed(service: Service, canaries: Canaries) -> None:
    with redirecting(f"http://127.0.0.2:{canaries.port}/") as url, guarded(service, Guard(("127.0.0.1/32",))):
        for index, table in enumerate(tables(url)[2:]):
            assert register(service, f"redirecting-{index}", table).status_code == 201
            service.http.post(f"/v1/teachers/redirecting-{index}/probe", json={"tokenizer": "none"})
        assert register(service, "redirecting", tables(url)[0]).status_code == 201
        assert service.http.post("/v1/teachers/redirecting/probe", json={}).status_code == 502
        response = service.http.post("/v1/score", json={"teacher": "redirecting", "items": [ITEM]})
        assert error_of(response) == (400, "teacher_refused")
    assert canaries.heard == []


@pytest.mark.parametrize("header", ["X-Request-Id", "X-Forwarded-Host", "X-Forwarded-For", "Referer", "Forwarded"])
def test_no_header_is_taken_for_an_address(service: Service, canaries: Canaries, header: str) -> None:
    value = f"http://127.0.0.2:{canaries.port}/"
    for path in ("/v1/capabilities", "/v1/teachers", "/v1/files", "/v1/runs", "/version"):
        assert service.http.get(path, headers={header: value}).status_code == 200
    assert canaries.heard == []


def fresh_scorers(service: Service, name: str, url: str) -> None:
    """A new revision of the teacher, which is asked over a connection of its own."""
    etag = service.http.get(f"/v1/teachers/{name}").headers["etag"]
    change = {"teacher": tables(url)[0]}
    assert service.http.patch(f"/v1/teachers/{name}", json=change, headers={"if-match": etag}).status_code == 200


@contextmanager
def redirecting(location: str) -> Iterator[str]:
    """A server that sends everybody elsewhere."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                body = json.dumps({"location": location})
                head = f"HTTP/1.1 302 Found\r\nlocation: {location}\r\ncontent-length: {len(body)}\r\n"
                connection.sendall(f"{head}connection: close\r\n\r\n{body}".encode())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()
